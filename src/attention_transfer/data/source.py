"""`Source`: labels of any kind of data, and images to load once the selection is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .images import ImageSet, Triple
from .labels import Labels, encode_labels
from .options import DataOptions
from .reader import Reader
from .stream import StreamSet

Load = Callable[[Tensor], tuple[ImageSet, int]]
Labelled = tuple[Reader, Labels]


@dataclass(frozen=True, eq=False)
class Split:
    """The training or the validation images.

    Args:
        labels: int64 (N,).
        load: from indices (M,) to the decoded images and the number of bad ones that were left out.
        stream: decodes the images anew each time; None if they have no files.
    """

    labels: Tensor
    load: Load
    stream: StreamSet | None = None

    @classmethod
    def from_images(cls, images: ImageSet) -> Split:
        """A split of decoded images."""

        def load(indices: Tensor) -> tuple[ImageSet, int]:
            if len(indices) == len(images):
                return images, 0  # without a copy
            return images.subset(indices), 0

        return cls(images.labels, load)

    @classmethod
    def from_stream(cls, stream: StreamSet) -> Split:
        """A split of images in files."""
        return cls(stream.labels, stream.load, stream)

    def select(self, indices: Tensor) -> Split:
        """The images at sorted `indices` (M,); nothing is decoded."""
        if self.stream is not None:
            return Split.from_stream(self.stream.select(indices))
        return Split(self.labels[indices], lambda chosen: self.load(indices[chosen]))

    def with_resize(self, factor: float) -> Split:
        """Images in files, resized to `factor` times their size before the center crop."""
        if self.stream is None or factor == 1:
            return self
        short_side = round(self.stream.size * factor)
        return Split.from_stream(replace(self.stream, short_side=short_side))


@dataclass(frozen=True, eq=False)
class Source:
    """Data that is opened but not decoded.

    Args:
        size: height and width of the images in pixels.
        val: None if the data has no validation images, or --val-split replaces them.
        statistics: mean and standard deviation by channel, where they are published.
        skipped: number of images that could not be listed.
        notes: for the user.
    """

    classes: tuple[str, ...]
    size: int
    train: Split
    val: Split | None
    statistics: tuple[Triple, Triple] | None = None
    skipped: int = 0
    notes: tuple[str, ...] = ()

    def resized(self, size: int | None) -> Source:
        """The same source, its images (and boxes) of one known size resized after decoding."""
        if size is None or size == self.size:
            return self
        train, val = _resized(self.train, size), self.val
        if val is not None:
            val = _resized(val, size)
        # Resizing smooths, which lowers the standard deviation: measure it again.
        return replace(self, size=size, train=train, val=val, statistics=None)


def source_in_files(
    train: Labelled,
    val: Labelled | None,
    classes: tuple[str, ...],
    options: DataOptions,
    *,
    skipped: int = 0,
    notes: tuple[str, ...] = (),
) -> Source:
    """A source of images that stay in their files.

    Raises:
        UserError: for a label that is none of `classes`.
    """
    size = options.image_size or train[0].default_size()

    def split(reader: Reader, labels: Labels) -> Split:
        encoded = encode_labels(reader, labels, classes)
        rows = torch.arange(len(reader))
        stream = StreamSet(reader, rows, encoded, classes, size, on_bad_image=options.on_bad_image)
        return Split.from_stream(stream)

    source = Source(classes, size, split(*train), None, skipped=skipped, notes=notes)
    if val is None:
        return source
    return replace(source, val=split(*val))


def _resized(split: Split, size: int) -> Split:
    def load(indices: Tensor) -> tuple[ImageSet, int]:
        images, skipped = split.load(indices)
        return resize_images(images, size), skipped

    return Split(split.labels, load)


def resize_images(images: ImageSet, size: int) -> ImageSet:
    """Square images resized to (N, size, size, 3), bilinear with antialiasing.

    Boxes grow outwards to whole pixels.
    """
    old = images.image_size[0]
    resized = []
    for piece in torch.split(images.images, 1024):
        nchw = torch.nn.functional.interpolate(
            piece.permute(0, 3, 1, 2), size=(size, size), mode="bilinear", antialias=True
        )
        resized.append(nchw.permute(0, 2, 3, 1))
    boxes = images.boxes
    if boxes is not None:
        low, high = boxes[:, :2] * size // old, (boxes[:, 2:] * size + old - 1) // old
        boxes = torch.cat([low, high], dim=1)
    return replace(images, images=torch.cat(resized), boxes=boxes)
