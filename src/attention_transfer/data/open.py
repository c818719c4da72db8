"""`open_data`: opens the training and validation images of a data spec."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, first_few, nearest
from ..options import from_mapping, subset
from .dataset import SHOWN_IMAGES, STATISTICS_IMAGES, Dataset
from .decode import check_memory, memory_budget
from .fingerprint import data_record
from .images import (
    ImageSet,
    balanced_subset,
    channel_statistics,
    resize_images,
    stratified_split,
)
from .options import DATA_SPECS, DataOptions
from .source import Images, Source
from .spec import existing_folder, split_columns
from .stream import StreamSet

VAL_SPLIT = 0.1  # of each class, if the data has no validation images


def open_data(
    data: str | DataOptions,
    *,
    seed: int = 0,
    val_resize: float = 1.0,
    memory: int | None = None,
    **changes: Any,
) -> Dataset:
    """Images as uint8 (N, size, size, 3), decoded once, or streamed by `workers` processes.

    Each image is resized to `image_size` pixels on its shorter side and center-cropped. With
    `stream="auto"`, images are streamed if they do not fit into memory once decoded.

    Args:
        data: a spec such as folder:PATH, or all options; `changes` are options by name.
        seed: draws the training images of `limit_train` and `val_split`. The validation images of
            `limit_val` and of the default split are the same for every seed, so that runs compare.
        val_resize: factor on the size of validation images in files before the center crop.
        memory: bytes for decoded images, if a device has less than this machine.

    Raises:
        UserError: for wrong options and for data that cannot be opened.
    """
    given: dict[str, Any] = {"data": data}
    if isinstance(data, DataOptions):
        given = vars(subset(data, DataOptions))
    options = from_mapping(DataOptions, {**given, **changes})
    spec = options.data

    source = _open_source(options)
    train, val, shown, notes = _select(source, options, seed)
    size = options.image_size or train.image_size[0]
    # Data of one known size, such as CIFAR-10, is decoded at that size and resized later.
    streamable = isinstance(train, StreamSet) and train.size == size
    if streamable and isinstance(val, StreamSet) and val_resize != 1:
        val = replace(val, short_side=round(size * val_resize))
    count = len(train) + len(val)
    if not _is_streamed(options, streamable, count * size**2 * 3, memory):
        check_memory(spec, count, size, streamable)
        native_size = train.image_size[0]
        train_images, bad_train = _decode(spec, "training", train, size)
        val_images, bad_val = _decode(spec, "validation", val, size)
        if source.statistics is not None and native_size == size:
            mean, std = source.statistics
        else:  # resizing smooths, which lowers the standard deviation
            mean, std = channel_statistics(train_images.images)
        if bad_val:  # the others have other indices now
            shown = balanced_subset(val_images.labels, SHOWN_IMAGES, 0)
        skipped = source.skipped + bad_train + bad_val
        record = data_record(source, size)
        return Dataset(spec, train_images, val_images, mean, std, record, skipped, notes, shown)
    assert isinstance(train, StreamSet), "it is streamable"
    assert isinstance(val, StreamSet), "it is from the same kind of files"
    sample = train.select(balanced_subset(train.labels, STATISTICS_IMAGES, 0))
    mean, std = channel_statistics(_decode(spec, "training", sample, size)[0].images)
    workers = options.workers or 0
    train, val = replace(train, workers=workers), replace(val, workers=workers)
    record = data_record(source, size)
    return Dataset(spec, train, val, mean, std, record, source.skipped, notes, shown)


def list_images(options: DataOptions) -> tuple[Images, Images]:
    """The training and validation images of seed 0, not decoded."""
    train, val, _, _ = _select(_open_source(options), options, seed=0)
    return train, val


def prepare_data(spec: str) -> None:
    """Downloads data before several processes open it. (For the hub, its library has locks.)"""
    kind, _, place = spec.partition(":")
    if kind in ("cifar10", "cifar100") and not place:
        from .cifar import download

        download(kind)
    elif kind == "wds" and place:
        from .shards import find_shards

        find_shards(place)


def _open_source(options: DataOptions) -> Source:
    try:
        return _read_source(options)
    except OSError as error:
        name = error.filename or "it"
        raise UserError(
            f"cannot open {options.data}: {name}: {error.strerror or error}; check the path and "
            "its permissions"
        ) from error


def _read_source(options: DataOptions) -> Source:
    """Opens the data with the module that reads this kind."""
    spec = options.data
    kind, colon, place = spec.partition(":")
    if kind == "digits":
        if colon:
            raise UserError(f"data {spec!r}: digits is built in and takes no folder; write digits")
        from .digits import open_digits

        return open_digits()
    if kind in ("cifar10", "cifar100"):
        from .cifar import open_cifar

        return open_cifar(kind, place, options)
    if kind not in ("folder", "parquet", "wds", "hub"):
        raise _unknown_kind(spec, kind)

    columns: dict[str, str] = {}
    if kind in ("parquet", "hub"):
        place, columns = split_columns(spec, place)
    if not place:
        expected = next(s for s in DATA_SPECS if s.startswith(kind))
        raise UserError(f"data {spec!r} lacks a path or name: expected {expected}; add it")
    if kind == "wds":
        from .wds import open_wds

        return open_wds(place, options)
    if kind == "hub":
        from .tables import open_hub

        return open_hub(place, options, **columns)
    path = existing_folder(spec, place, "the data's folder")
    if kind == "folder":
        from .image_folder import open_folder

        return open_folder(path, options)
    from .tables import open_parquet

    return open_parquet(path, options, **columns)


def _unknown_kind(spec: str, kind: str) -> UserError:
    kinds = [s.partition("[")[0].partition(":")[0] for s in DATA_SPECS]
    hint = nearest(kind, kinds)
    if not hint and os.path.isdir(os.path.expanduser(spec)):
        hint = f"; did you mean folder:{spec}?"
    return UserError(f"unknown data {spec!r}: expected one of {', '.join(DATA_SPECS)}{hint}")


def _untrained_class_notes(source: Source) -> list[str]:
    """A warning about classes without training images."""
    classes = source.train.classes
    counts = torch.bincount(source.train.labels, minlength=len(classes))
    empty = [classes[label] for label in (counts == 0).nonzero().flatten().tolist()]
    if not empty:
        return []
    share = f"{len(empty):,} of {len(classes):,} classes"
    verb = "has" if len(empty) == 1 else "have"
    return [f"warning: {share} {verb} no training image: {first_few(empty)}"]


def _select(
    source: Source, options: DataOptions, seed: int
) -> tuple[Images, Images, Tensor, tuple[str, ...]]:
    """Training and validation images after limits and split, the indices of the images whose maps
    are stored, and notes."""
    notes = [*source.notes, *_untrained_class_notes(source)]
    train, val = source.train, source.val
    if val is None or options.val_split is not None:
        train, val, split_notes = _cut_validation(options.data, train, options.val_split, seed)
        notes += split_notes
    train = _limited(train, options.limit_train, seed)
    # The same images for every seed, so that runs can be compared.
    kept = balanced_subset(val.labels, options.limit_val or max(1, len(val)), 0)
    # A smaller subset is a part of a larger one: runs of any --limit-val show the same images.
    shown = balanced_subset(val.labels, max(1, min(len(kept), SHOWN_IMAGES)), 0)
    if len(kept) < len(val):
        val = val.select(kept)
    return train, val, torch.searchsorted(kept, shown), tuple(notes)


def _cut_validation(
    spec: str, train: Images, val_split: float | None, seed: int
) -> tuple[Images, Images, list[str]]:
    """The rest of the training images, the validation images cut from them, and notes."""
    notes = []
    share = val_split or VAL_SPLIT
    if val_split is None:
        # The default split ignores the seed, so that runs can be compared and no student is
        # validated on images that its teacher was trained on.
        seed = 0
    rest, cut = stratified_split(train.labels, share, seed)
    if not len(cut):
        reason = "val_split"
        if val_split is None:
            reason = "it has no validation images, and splitting some from train"
        raise UserError(
            f"{spec}: {reason} needs a class with at least 2 training images, found none: "
            "add images"
        )
    if val_split is None:
        notes.append(
            f"{spec} has no validation images: {len(cut)} of its {len(train)} training images "
            f"({share:.0%} of each class, the same for every seed) are used for validation; "
            "--val-split sets the share"
        )
    single = int((torch.bincount(train.labels) == 1).sum())
    if single:
        classes = "1 class has" if single == 1 else f"{single} classes have"
        notes.append(
            f"warning: {classes} a single image, which is used for training, not for validation"
        )
    return train.select(rest), train.select(cut), notes


def _limited(images: Images, limit: int | None, seed: int) -> Images:
    if limit is None or limit >= len(images):
        return images
    return images.select(balanced_subset(images.labels, limit, seed))


def _is_streamed(options: DataOptions, streamable: bool, needed: int, memory: int | None) -> bool:
    """Whether to stream; `needed` is the size of all decoded images in bytes."""
    if options.stream == "on" and not streamable:
        raise UserError(
            f"{options.data} is read into memory as a whole and cannot be streamed: expected images"
            " in files; leave --stream (and --augment imagenet) out"
        )
    if options.stream != "auto" or not streamable:
        return options.stream == "on"
    limits = [limit for limit in (memory_budget(), memory) if limit is not None]
    return any(needed > limit for limit in limits)


def _decode(spec: str, name: str, images: Images, size: int) -> tuple[ImageSet, int]:
    """All images at `size`, and the number of unreadable ones that were left out."""
    count = len(images)
    if isinstance(images, StreamSet):
        images = images.subset(torch.arange(count))
    if not len(images):
        raise UserError(f"{spec}: none of the {count} {name} images can be read: check the files")
    if images.image_size[0] != size:
        images = resize_images(images, size)
    return images, count - len(images)
