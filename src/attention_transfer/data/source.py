"""`Source`: the labelled images of a data spec. Images in files are not decoded yet."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .images import ImageSet, Triple
from .labels import Labels, encode_labels
from .options import DataOptions
from .reader import Reader
from .stream import StreamSet

Images = ImageSet | StreamSet
Labelled = tuple[Reader, Labels]


@dataclass(frozen=True, eq=False)
class Source:
    """The images of a data spec, before any are selected."""

    train: Images
    val: Images | None  # None if the data has none, or --val-split replaces them
    statistics: tuple[Triple, Triple] | None = None  # mean and std by channel, if published
    skipped: int = 0  # images that could not be listed
    notes: tuple[str, ...] = ()  # for the user


def source_in_files(
    train: Labelled,
    val: Labelled | None,
    classes: tuple[str, ...],
    options: DataOptions,
    *,
    skipped: int = 0,
    notes: tuple[str, ...] = (),
) -> Source:
    """A source of images that stay in their files; labels must be of `classes`."""
    size = options.image_size or train[0].default_size()

    def stream(reader: Reader, labels: Labels) -> StreamSet:
        encoded, rows = encode_labels(reader, labels, classes), torch.arange(len(reader))
        return StreamSet(reader, rows, encoded, classes, size, on_bad_image=options.on_bad_image)

    train_set, val_set = stream(*train), None
    if val is not None:
        val_set = stream(*val)
    return Source(train_set, val_set, skipped=skipped, notes=notes)
