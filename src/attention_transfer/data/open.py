"""`open_data`: from the words of a spec to decoded training and validation images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError, check_choice, nearest
from .dataset import STATISTICS_IMAGES, Dataset
from .decode import ON_BAD_IMAGE, check_memory, memory_share
from .images import ImageSet, balanced_subset, channel_statistics, seeded, stratified_split
from .source import Source, Split
from .spec import nearest_path, split_columns
from .stream import StreamSet, shuffled_blocks

DATA_SPECS = (
    "digits", "cifar10[:FOLDER]", "cifar100[:FOLDER]", "folder:PATH", "parquet:PATH", "wds:PATTERN", "hub:OWNER/NAME",
)  # fmt: skip
STREAM = ("auto", "on", "off")
VAL_SPLIT = 0.1


def open_data(
    spec: str,
    *,
    image_size: int | None = None,
    limit_train: int | None = None,
    limit_val: int | None = None,
    val_split: float | None = None,
    seed: int = 0,
    on_bad_image: str = "error",
    stream: str = "auto",
    workers: int = 0,
    val_resize: float = 1.0,
    memory: int | None = None,
) -> Dataset:
    """The images named by `spec`: decoded once, as uint8 tensors (N, image_size, image_size, 3), or streamed.

    With `stream="auto"` they are streamed, by so many `workers`, where decoded they would not fit the memory that is
    free (nor `memory` bytes, where a device has less). The shorter side of an image is brought to `image_size` and the
    centre is cut out; that of validation images in files, to `val_resize` times as much.

    `val_split` cuts that fraction of every class from the training images and takes it in place of the validation
    images (without it, a tenth is cut from data that has none, the same for every seed); `limit_train` and `limit_val`
    keep so many images, balanced over the classes; `seed` draws what is trained on; the validation subset is the same
    for every seed, so that runs can be compared. `on_bad_image="skip"` leaves unreadable images out and counts them.
    Raises `UserError` for what cannot be opened.
    """
    check_choice("on_bad_image", on_bad_image, ON_BAD_IMAGE)
    check_choice("stream setting", stream, STREAM)
    for name, value in (
        ("image_size", image_size),
        ("limit_train", limit_train),
        ("limit_val", limit_val),
    ):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise UserError(
                f"{name} must be a whole number of at least 1, got {value!r}: give such a number or none"
            )
    if val_split is not None and not 0 < val_split < 1:
        raise UserError(
            f"val_split must be between 0 and 1 (such as 0.1), got {val_split!r}: give such a fraction"
        )

    source = _open_source(spec, image_size, on_bad_image, want_val=val_split is None)
    train, val = source.train, source.val
    notes = [*source.notes, *_absent(source)]
    if val is None or val_split is not None:
        train, val, said = _cut(spec, train, val_split, seed)
        notes += said
    train, val = (
        _limited(train, limit_train, seed),
        _limited(val.enlarged(val_resize), limit_val, 0),
    )

    count = len(train.labels) + len(val.labels)
    if _streamed(spec, stream, train, count * source.size**2 * 3, memory):
        assert train.stream is not None, "`_streamed` says so"
        assert val.stream is not None, "both come from the same files"
        looked_at = train.at(_sample(train.stream))
        mean, std = channel_statistics(_load(spec, "training", looked_at)[0].images)
        train_set, val_set = (
            replace(train.stream, workers=workers),
            replace(val.stream, workers=workers),
        )
        return Dataset(spec, train_set, val_set, mean, std, source.skipped, tuple(notes))
    check_memory(spec, count, source.size)
    train_images, train_skipped = _load(spec, "training", train)
    val_images, val_skipped = _load(spec, "validation", val)
    mean, std = source.statistics or channel_statistics(train_images.images)
    skipped = source.skipped + train_skipped + val_skipped
    return Dataset(spec, train_images, val_images, mean, std, skipped, tuple(notes))


def _absent(source: Source) -> list[str]:
    """What is to be said of classes that nothing trains."""
    counts = torch.bincount(source.train.labels, minlength=len(source.classes))
    absent = (counts == 0).nonzero().flatten().tolist()
    if not absent:
        return []
    names = ", ".join(source.classes[label] for label in absent[:3]) + (
        ", …" if len(absent) > 3 else ""
    )
    verb = "has" if len(absent) == 1 else "have"
    return [
        f"warning: {len(absent):,} of {len(source.classes):,} classes {verb} no training image: {names}"
    ]


def _cut(
    spec: str, train: Split, val_split: float | None, seed: int
) -> tuple[Split, Split, list[str]]:
    """Training and validation images from the training images, and what is to be said of it."""
    notes = []
    # What nobody asked for is the same for every seed, so that runs can be compared and no student is judged by images
    # that its teacher has seen.
    share, seed = (VAL_SPLIT, 0) if val_split is None else (val_split, seed)
    rest, cut = stratified_split(train.labels, share, seed)
    if not len(cut):
        why = (
            "val_split"
            if val_split is not None
            else "it has no validation images, and cutting some from train"
        )
        raise UserError(
            f"{spec}: {why} needs a class with at least 2 training images, found none: add images"
        )
    if val_split is None:
        notes.append(
            f"{spec} has no validation images: {len(cut)} of its {len(train.labels)} training images ({share:.0%} of "
            "each class, the same for every seed) validate instead; --val-split says how many"
        )
    alone = int((torch.bincount(train.labels) == 1).sum())
    if alone:
        one = (
            "1 class has a single image, which"
            if alone == 1
            else f"{alone} classes have a single image, which"
        )
        notes.append(f"warning: {one} is trained on: nothing validates it")
    return train.at(rest), train.at(cut), notes


def _sample(images: StreamSet) -> Tensor:
    """Sorted indices of `STATISTICS_IMAGES` images, of as few blocks as can be where they are read in blocks."""
    if images.reader.blocks is None:
        return balanced_subset(images.labels, STATISTICS_IMAGES, 0)
    return (
        shuffled_blocks(images.reader.blocks[images.rows], 1, seeded(0))[:STATISTICS_IMAGES]
        .sort()
        .values
    )


def _streamed(spec: str, stream: str, train: Split, needed: int, memory: int | None) -> bool:
    if stream == "off":
        return False
    if stream == "on":
        if train.stream is None:
            raise UserError(
                f"{spec} is in memory as it is read and cannot be streamed: expected images in files; "
                "leave --stream (and --augment imagenet) out"
            )
        return True
    room = [bytes for bytes in (memory_share(), memory) if bytes is not None]
    return train.stream is not None and bool(room) and needed > min(room)


def _open_source(spec: str, image_size: int | None, on_bad_image: str, want_val: bool) -> Source:
    """Splits the spec into its kind and place and asks the one file that knows this kind."""
    kind, colon, place = spec.partition(":")
    path = Path(place).expanduser() if place else None
    if kind == "digits":
        if colon:
            raise UserError(f"data {spec!r}: digits is built in and takes no folder; write digits")
        from .digits import open_digits

        return open_digits().resized(image_size)
    if kind in ("cifar10", "cifar100"):
        from .cifar import open_cifar

        return open_cifar(kind, path, on_bad_image, want_val).resized(image_size)
    if kind in ("folder", "parquet"):
        columns: dict[str, str] = {}
        if kind == "parquet":
            place, columns = split_columns(spec, place)
        if not place:
            raise UserError(
                f"data {spec!r} names no place: expected {kind}:PATH; add the path of the data's folder"
            )
        path = Path(place).expanduser()
        if not path.is_dir():
            state = "is not a folder" if path.exists() else "does not exist"
            hint = nearest_path(path)
            raise UserError(
                f"data {spec!r}: {path} {state}; expected the data's folder; check the path{hint}"
            )
        if kind == "folder":
            from .image_folder import open_folder

            return open_folder(path, image_size, on_bad_image, want_val)
        from .parquet import open_parquet

        return open_parquet(path, image_size, on_bad_image, want_val, **columns)
    if kind in ("wds", "hub"):
        if not place:
            expected = next(known for known in DATA_SPECS if known.startswith(kind))
            raise UserError(f"data {spec!r} names no place: expected {expected}; add it")
        if kind == "wds":
            from .wds import open_wds

            return open_wds(place, image_size, on_bad_image, want_val)
        from .hub import open_hub

        place, columns = split_columns(spec, place)
        return open_hub(place, image_size, on_bad_image, want_val, **columns)
    kinds = [known.partition("[")[0].partition(":")[0] for known in DATA_SPECS]
    hint = nearest(kind, kinds)
    if not hint and Path(spec).expanduser().is_dir():
        hint = f"; did you mean folder:{spec}?"
    raise UserError(f"unknown data {spec!r}: expected one of {', '.join(DATA_SPECS)}{hint}")


def _limited(split: Split, limit: int | None, seed: int) -> Split:
    if limit is None or limit >= len(split.labels):
        return split
    return split.at(balanced_subset(split.labels, limit, seed))


def _load(spec: str, what: str, split: Split) -> tuple[ImageSet, int]:
    images, skipped = split.load(torch.arange(len(split.labels)))
    if not len(images):
        raise UserError(
            f"{spec}: none of the {skipped} {what} images can be read; expected some; check the files"
        )
    return images, skipped
