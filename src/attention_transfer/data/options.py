"""The data options: which images, how many, how they are read and augmented; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..errors import UserError
from ..options import Bool, Float, Int, Numbers, option, option_specs

DATA_SPECS = (
    "digits",
    "cifar10[:FOLDER]",
    "cifar100[:FOLDER]",
    "folder:PATH",
    "parquet:PATH",
    "wds:PATTERN",
    "hub:OWNER/NAME",
)
COLUMNS = ("image", "label")  # that a spec may name: parquet:PATH#image=COLUMN,label=COLUMN
# Larger values are typing errors: an image of 0.8 GB, a thousand processes.
MOST_PIXELS = 1 << 14
MOST_WORKERS = 1 << 10
DATA_NAMES = f"{', '.join(DATA_SPECS[:-1])} or {DATA_SPECS[-1]}"


@dataclass(frozen=True)
class DataOptions:
    """Data options."""

    data: Annotated[str, option(f"{DATA_NAMES}.")] = "digits"
    image_size: Annotated[
        Int | None,
        option(
            "Resize images to this height and width, in pixels.",
            ge=1,
            le=MOST_PIXELS,
            default_text="from the data",
        ),
    ] = None
    limit_train: Annotated[
        Int | None,
        option("Number of training images, balanced over the classes.", ge=1, default_text="all"),
    ] = None
    limit_val: Annotated[
        Int | None,
        option("Number of validation images, balanced over the classes.", ge=1, default_text="all"),
    ] = None
    val_split: Annotated[
        Float | None,
        option(
            "Validate on this share of the training images; the test set is not used.",
            gt=0,
            lt=1,
            default_text="0.1 for data without validation images",
        ),
    ] = None
    on_bad_image: Annotated[
        Literal["error", "skip"],
        option("If an image cannot be read: stop, or skip and count it.", changes_numbers=False),
    ] = "error"
    stream: Annotated[
        Literal["auto", "on", "off"],
        option(
            "Decode images during training; auto: only if they do not fit in memory.",
            changes_numbers=False,
        ),
    ] = "auto"
    workers: Annotated[
        Int | None,
        option(
            "Number of processes that decode streamed images.",
            ge=0,
            le=MOST_WORKERS,
            default_text="from the number of cores",
            changes_numbers=False,
        ),
    ] = None


@dataclass(frozen=True)
class AugmentOptions:
    """Augmentation options."""

    augment: Annotated[
        Literal["crop", "imagenet"],
        option(
            "crop: pad, crop and flip; imagenet: random resized crop and flip of whole images "
            "(validation: the central 224 of 256)."
        ),
    ] = "crop"
    crop_padding: Annotated[
        Int, option("Pixels of reflection padding before a random crop; 0: no crop.", ge=0)
    ] = 4
    crop_scale: Annotated[
        Numbers,
        option(
            "With --augment imagenet: range of the crop's share of the image area.",
            expected="LOW,HIGH with 0 < LOW ≤ HIGH ≤ 1",
        ),
    ] = (0.08, 1.0)
    crop_ratio: Annotated[
        Numbers,
        option(
            "With --augment imagenet: range of the crop's width to height.",
            expected="LOW,HIGH with 0 < LOW ≤ HIGH",
        ),
    ] = (3 / 4, 4 / 3)
    flip: Annotated[Bool, option("Random horizontal flips.", default_text="on; digits: off")] = True
    views: Annotated[
        Int | None,
        option(
            "Number of fixed augmented views of each image; epoch e shows view e mod N. auto: a "
            "third of the epochs.",
            expected="a whole number ≥ 1, or auto",
            ge=1,
            default_text="off: new crops in every epoch",
        ),
    ] = None


# The options of the other augmentation, by `augment`.
UNUSED_OPTIONS = {"crop": ("crop_scale", "crop_ratio"), "imagenet": ("crop_padding",)}


def data_defaults(spec: str) -> dict[str, Any]:
    """The options whose default differs for this data."""
    if spec == "digits":
        return {"flip": False}  # a mirrored digit is not a digit
    return {}


def check_augment(options: AugmentOptions, stream: str) -> None:
    """Raises `UserError` for impossible crops and for options of another augmentation."""
    specs = option_specs(AugmentOptions)
    for key, highest in (("crop_scale", 1.0), ("crop_ratio", math.inf)):
        value = getattr(options, key)
        if len(value) != 2 or not 0 < value[0] <= value[1] <= highest or value[1] == math.inf:
            raise UserError(f"{key} is {value!r}: expected {specs[key].expected}")
    for key in UNUSED_OPTIONS[options.augment]:
        if getattr(options, key) != specs[key].default:
            raise UserError(
                f"{specs[key].flags[0]} is given, but --augment {options.augment} has none: "
                "leave it out"
            )
    if options.augment == "imagenet" and stream == "off":
        raise UserError(
            "--augment imagenet crops images while they are decoded: leave --stream off out"
        )
