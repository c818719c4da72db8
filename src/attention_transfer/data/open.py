"""`open_data`: from the words of a spec to decoded training and validation images."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import UserError, check_choice, nearest
from .decode import ON_BAD_IMAGE, check_memory
from .images import Dataset, ImageSet, balanced_subset, channel_statistics, stratified_split
from .source import Source, Split

SPECS = ("digits", "cifar10[:FOLDER]", "cifar100[:FOLDER]", "folder:PATH", "parquet:PATH")


def open_data(
    spec: str,
    *,
    image_size: int | None = None,
    limit_train: int | None = None,
    limit_val: int | None = None,
    val_split: float | None = None,
    seed: int = 0,
    on_bad_image: str = "error",
) -> Dataset:
    """Decodes the images named by `spec` once, as uint8 tensors (N, image_size, image_size, 3).

    `val_split` cuts that fraction of every class from the training images and takes it in place of the validation
    images; `limit_train` and `limit_val` keep so many images, balanced over the classes; `seed` draws what is
    trained on; the validation subset is the same for every seed, so that runs can be compared.
    `on_bad_image="skip"` leaves unreadable images out and counts them. Raises `UserError` for what cannot be opened.
    """
    check_choice("on_bad_image", on_bad_image, ON_BAD_IMAGE)
    for name, value in (("image_size", image_size), ("limit_train", limit_train), ("limit_val", limit_val)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f"{name} must be a whole number of at least 1, got {value!r}: give such a number or none")
    if val_split is not None and not 0 < val_split < 1:
        raise UserError(f"val_split must be between 0 and 1 (such as 0.1), got {val_split!r}: give such a fraction")

    source = _open_source(spec, image_size, on_bad_image, want_val=val_split is None)
    train, val = source.train, source.val
    if val_split is not None:
        rest, cut = stratified_split(train.labels, val_split, seed)
        if not len(cut):
            raise UserError(f"{spec}: val_split needs a class with at least 2 training images, found none: add images")
        train, val = train.at(rest), train.at(cut)
    assert val is not None, "an opener leaves val out only where it is not wanted"
    train, val = _limited(train, limit_train, seed), _limited(val, limit_val, 0)

    check_memory(spec, len(train.labels) + len(val.labels), source.size)
    train_images, train_skipped = _load(spec, "training", train)
    val_images, val_skipped = _load(spec, "validation", val)
    mean, std = source.statistics or channel_statistics(train_images.images)
    return Dataset(spec, train_images, val_images, mean, std, train_skipped + val_skipped)


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
        if path is None:
            raise UserError(f"data {spec!r} names no place: expected {kind}:PATH; add the path of the data's folder")
        if not path.is_dir():
            state = "is not a folder" if path.exists() else "does not exist"
            raise UserError(f"data {spec!r}: {path} {state}; expected the data's folder; check the path")
        if kind == "folder":
            from .folder import open_folder

            return open_folder(path, image_size, on_bad_image, want_val)
        from .parquet import open_parquet

        return open_parquet(path, image_size, on_bad_image, want_val)
    kinds = [known.partition("[")[0].partition(":")[0] for known in SPECS]
    hint = nearest(kind, kinds)
    if not hint and Path(spec).expanduser().is_dir():
        hint = f"; did you mean folder:{spec}?"
    raise UserError(f"unknown data {spec!r}: expected one of {', '.join(SPECS)}{hint}")


def _limited(split: Split, limit: int | None, seed: int) -> Split:
    if limit is None or limit >= len(split.labels):
        return split
    return split.at(balanced_subset(split.labels, limit, seed))


def _load(spec: str, what: str, split: Split) -> tuple[ImageSet, int]:
    images, skipped = split.load(torch.arange(len(split.labels)))
    if not len(images):
        raise UserError(f"{spec}: none of the {skipped} {what} images can be read; expected some; check the files")
    return images, skipped
