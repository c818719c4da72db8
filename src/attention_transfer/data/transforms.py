"""From one encoded image to the pixels that a network sees, in the workers of a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError
from .augment import check_padding, reflected
from .decode import Encoded, decode_centre, open_image, orientation, to_rgb, turned

AUGMENTS = ("crop", "imagenet")
SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
# With `imagenet`, validation images are resized so much larger than the centre that is cut from them.
VAL_RESIZE = 256 / 224


@dataclass(frozen=True)
class Draw:
    """What was drawn for one image of an epoch (see `EpochPlan`)."""

    dy: int = 0
    dx: int = 0
    flip: bool = False
    noise: int = 0


class Transform(Protocol):
    """Writes one image into `out` (size, size, 3) uint8; `padding` and `flip` say what an epoch draws for it."""

    padding: int
    flip: bool

    def __call__(self, out: NDArray[np.uint8], encoded: Encoded, draw: Draw) -> None: ...


class Centre:
    """The shorter side resized to `shorter` (`size` where it is None), then the centre: nothing is drawn."""

    padding, flip = 0, False

    def __init__(self, shorter: int | None) -> None:
        self.shorter = shorter

    def __call__(self, out: NDArray[np.uint8], encoded: Encoded, draw: Draw) -> None:
        decode_centre(out, encoded, self.shorter)


class PadCrop:
    """As `Augment` does with resident images: the centre at `size`, reflect-padded, cropped, flipped."""

    def __init__(self, size: int, padding: int, flip: bool) -> None:
        check_padding(padding, size, size)
        self.padding, self.flip = padding, flip
        self._kept = reflected(size, padding).numpy()

    def __call__(self, out: NDArray[np.uint8], encoded: Encoded, draw: Draw) -> None:
        picture = np.empty_like(out)
        decode_centre(picture, encoded)
        columns = self._kept[draw.dx]
        out[:] = picture[self._kept[draw.dy]][:, columns[::-1] if draw.flip else columns]


class RandomResizedCrop:
    """torchvision's: a random share `scale` of the image's area, of a random `ratio` width to height, brought to size.

    Images smaller than `size` are enlarged, as torchvision does.
    """

    padding = 0

    def __init__(
        self,
        size: int,
        scale: Sequence[float] = SCALE,
        ratio: Sequence[float] = RATIO,
        flip: bool = True,
    ):
        from torchvision.transforms import v2

        check_ranges(scale, ratio)
        self.flip = flip
        self._crop: Any = v2.RandomResizedCrop(size, tuple(scale), tuple(ratio), antialias=True)
        self._resize: Any = partial(v2.functional.resize, size=[size, size], antialias=True)
        self._mirror: Any = v2.RandomHorizontalFlip() if flip else v2.Identity()

    def __call__(self, out: NDArray[np.uint8], encoded: Encoded, draw: Draw) -> None:
        picture = decode(encoded)
        with _seeded(draw.noise):
            at = self._crop.make_params([picture.permute(2, 0, 1)])
            # Channels last in memory, the crop alone: torchvision has a quicker resize for these, of the same pixels.
            cut = (
                picture[at["top"] :, at["left"] :][: at["height"], : at["width"]]
                .contiguous()
                .permute(2, 0, 1)
            )
            made = self._mirror(self._resize(cut))
        out[:] = made.permute(1, 2, 0).numpy()


def check_ranges(scale: Sequence[float], ratio: Sequence[float]) -> None:
    """Raises `UserError` unless both are (low, high), above 0, the scale's at most 1."""
    for name, value, most in (("crop_scale", scale, 1.0), ("crop_ratio", ratio, float("inf"))):
        if len(value) != 2 or not 0 < value[0] <= value[1] <= most or value[1] == float("inf"):
            end = " ≤ 1" if most == 1 else ""
            usual = "0.08,1" if most == 1 else "0.75,1.3333"
            raise UserError(
                f"{name} is {','.join(map(str, value))}: expected LOW,HIGH with 0 < low ≤ high{end}: {usual}"
            )


def make_transform(
    augment: str,
    size: int,
    crop_padding: int,
    flip: bool,
    scale: Sequence[float],
    ratio: Sequence[float],
) -> Transform:
    """The training transform that `augment` names, one of `AUGMENTS`."""
    return (
        PadCrop(size, crop_padding, flip)
        if augment == "crop"
        else RandomResizedCrop(size, scale, ratio, flip)
    )


def decode(encoded: Encoded) -> Tensor:
    """Any image upright as RGB uint8 (H, W, 3); of several frames the first. Raises what its decoder raises."""
    data = encoded.read_bytes() if isinstance(encoded, Path) else encoded
    with open_image(data) as image:
        # Only these: others have cases (CMYK, 16 bits, palettes, frames) that torchvision reads otherwise.
        plain = image.format == "JPEG" and image.mode in ("RGB", "L") and orientation(image) == 1
        if plain and data is not None and (made := _jpeg(data)) is not None:
            return made
        return torch.from_numpy(np.array(turned(to_rgb(image), image)))


def _jpeg(data: bytes) -> Tensor | None:
    """By torchvision, which takes two thirds of Pillow's time; None where it cannot, and Pillow is to say why."""
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        made = decode_jpeg(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB
        )
    except RuntimeError:
        return None
    return made.permute(1, 2, 0)


@contextmanager
def _seeded(noise: int) -> Iterator[None]:
    """torchvision draws from torch's global generator: seeded here, and left as it was found."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(noise)
    try:
        yield
    finally:
        generator.set_state(before)
