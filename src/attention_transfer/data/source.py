"""What every kind of data gives to `open_data`: labels at once, images only once it is known which are wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .images import ImageSet, Triple

Load = Callable[[Tensor], tuple[ImageSet, int]]


@dataclass(frozen=True, eq=False)
class Split:
    """Labels (N,) int64 and `load`: indices (M,) to the decoded images and how many bad ones were left out."""

    labels: Tensor
    load: Load

    @classmethod
    def of(cls, images: ImageSet) -> Split:
        """A split of images that are decoded already."""

        def load(indices: Tensor) -> tuple[ImageSet, int]:
            return (images if len(indices) == len(images) else images.subset(indices)), 0

        return cls(images.labels, load)

    def at(self, indices: Tensor) -> Split:
        """The part of this split at sorted `indices` (M,)."""
        return Split(self.labels[indices], lambda chosen: self.load(indices[chosen]))


@dataclass(frozen=True, eq=False)
class Source:
    """Opened but not yet decoded data; `size` is the side of its square images, `val` is None where not asked for."""

    classes: tuple[str, ...]
    size: int
    train: Split
    val: Split | None
    statistics: tuple[Triple, Triple] | None = None

    def resized(self, size: int | None) -> Source:
        """The same source with images (and boxes) resized after decoding, for data of one known size."""
        if size is None or size == self.size:
            return self
        val = None if self.val is None else _resized_split(self.val, size)
        # Statistics of the original size do not hold for smoothed images.
        return replace(self, size=size, train=_resized_split(self.train, size), val=val, statistics=None)


def _resized_split(split: Split, size: int) -> Split:
    def load(indices: Tensor) -> tuple[ImageSet, int]:
        images, skipped = split.load(indices)
        return resize_images(images, size), skipped

    return Split(split.labels, load)


def without_bad(images: ImageSet, sizes: NDArray[np.int64]) -> tuple[ImageSet, int]:
    """The images whose decoded `sizes` (N, 2) are not 0, and how many the others are."""
    good = torch.from_numpy(np.flatnonzero(sizes[:, 0]))
    skipped = len(images) - len(good)
    return (images.subset(good) if skipped else images), skipped


def resize_images(images: ImageSet, size: int) -> ImageSet:
    """Square images resized to (N, size, size, 3), bilinear with antialiasing; boxes grow outwards to whole pixels."""
    old = images.image_size[0]
    pieces = [
        torch.nn.functional.interpolate(
            piece.permute(0, 3, 1, 2), size=(size, size), mode="bilinear", antialias=True
        ).permute(0, 2, 3, 1)
        for piece in torch.split(images.images, 1024)
    ]
    boxes = images.boxes
    if boxes is not None:
        low, high = boxes[:, :2] * size // old, (boxes[:, 2:] * size + old - 1) // old
        boxes = torch.cat([low, high], dim=1)
    return replace(images, images=torch.cat(pieces), boxes=boxes)
