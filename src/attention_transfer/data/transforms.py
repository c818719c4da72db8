"""Transforms: from one encoded image to the pixels of a batch, in the workers of a stream."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .augment import check_padding, reflected_positions
from .decode import (
    UPRIGHT,
    Encoded,
    decode_center,
    exif_transposed,
    open_image,
    orientation,
    to_rgb,
)
from .options import AugmentOptions


def val_resize(augment: str) -> float:
    """The factor by which validation images are resized before the center crop."""
    if augment == "imagenet":
        return 256 / 224  # as in torchvision's ImageNet references
    return 1.0


@dataclass(frozen=True)
class AugmentDraw:
    """The random draws for one image of an epoch (see `EpochPlan`)."""

    dy: int = 0
    dx: int = 0
    flip: bool = False
    noise: int = 0


class Transform(Protocol):
    """Writes one image into `out` (size, size, 3) uint8.

    `padding` and `flip` tell the planner which crops and flips to draw.
    """

    padding: int
    flip: bool

    def __call__(self, out: NDArray[np.uint8], encoded: Encoded, draw: AugmentDraw) -> None: ...


class CenterCrop:
    """Resizes to `short_side` on the shorter side (default: the size of the crop) and crops."""

    padding, flip = 0, False

    def __init__(self, short_side: int | None) -> None:
        self.short_side = short_side

    def __call__(self, out: NDArray[np.uint8], encoded: Encoded, draw: AugmentDraw) -> None:
        decode_center(out, encoded, self.short_side)


class PadCrop:
    """The augmentation of `Augment` for one image: center crop, reflect-pad, crop, flip."""

    def __init__(self, size: int, padding: int, flip: bool) -> None:
        check_padding(padding, size, size)
        self.padding, self.flip = padding, flip
        self._positions = reflected_positions(size, padding).numpy()

    def __call__(self, out: NDArray[np.uint8], encoded: Encoded, draw: AugmentDraw) -> None:
        center = np.empty_like(out)
        # Decoded by Pillow, as resident images are, so that both have the same pixels.
        decode_center(center, encoded)
        columns = self._positions[draw.dx]
        if draw.flip:
            columns = columns[::-1]
        out[:] = center[self._positions[draw.dy]][:, columns]


class RandomResizedCrop:
    """torchvision's: a crop of random area and aspect ratio, resized to `size`."""

    padding = 0

    def __init__(self, size: int, options: AugmentOptions) -> None:
        from torchvision.transforms import v2

        self.flip = options.flip
        scale, ratio = tuple(options.crop_scale), tuple(options.crop_ratio)
        self._crop: Any = v2.RandomResizedCrop(size, scale, ratio, antialias=True)
        self._resize: Any = partial(v2.functional.resize, size=[size, size], antialias=True)
        self._flip: Any = v2.RandomHorizontalFlip() if options.flip else v2.Identity()

    def __call__(self, out: NDArray[np.uint8], encoded: Encoded, draw: AugmentDraw) -> None:
        image = decode(encoded)
        # torchvision draws from torch's global generator.
        with torch.random.fork_rng([]):
            # `torch.manual_seed` would also seed the GPUs, which `fork_rng([])` does not restore.
            torch.default_generator.manual_seed(draw.noise)
            box = self._crop.make_params([image.permute(2, 0, 1)])
            # A contiguous crop, channels last in memory, takes torchvision's faster resize, which
            # gives the same pixels.
            crop = image[box["top"] :, box["left"] :][: box["height"], : box["width"]]
            chw = self._flip(self._resize(crop.contiguous().permute(2, 0, 1)))
        out[:] = chw.permute(1, 2, 0).numpy()


def make_transform(options: AugmentOptions, size: int) -> Transform:
    """The training transform of `options` for images of `size` x `size`."""
    if options.augment == "crop":
        return PadCrop(size, options.crop_padding, options.flip)
    return RandomResizedCrop(size, options)


def decode(encoded: Encoded) -> Tensor:
    """Decodes an image as upright RGB uint8 (H, W, 3); of several frames, the first."""
    data = encoded.read_bytes() if isinstance(encoded, Path) else encoded
    with open_image(data) as image:
        # torchvision reads other cases differently: CMYK, 16 bits, palettes, frames.
        is_plain = image.format == "JPEG" and image.mode in ("RGB", "L")
        if is_plain and data is not None and orientation(image) == UPRIGHT:
            pixels = _decode_jpeg(data)
            if pixels is not None:
                return pixels
        return torch.from_numpy(np.array(to_rgb(exif_transposed(image))))


def _decode_jpeg(data: bytes) -> Tensor | None:
    """Decodes with torchvision, which is faster than Pillow (results/bench.md).

    None if that fails: then Pillow tries, and its error says why.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    # A copy, because `torch.frombuffer` warns about bytes, which are read-only.
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        return decode_jpeg(encoded, mode=ImageReadMode.RGB).permute(1, 2, 0)
    except RuntimeError:
        return None
