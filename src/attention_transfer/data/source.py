"""What every kind of data gives to `open_data`: labels at once, images only once it is known which are wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .images import ImageSet, Triple
from .stream import StreamSet

Load = Callable[[Tensor], tuple[ImageSet, int]]


@dataclass(frozen=True, eq=False)
class Split:
    """Labels (N,) int64 and `load`: indices (M,) to the decoded images and how many bad ones were left out.

    `stream`, where the images can be decoded anew each time, is the set that does so.
    """

    labels: Tensor
    load: Load
    stream: StreamSet | None = None

    @classmethod
    def of(cls, images: ImageSet) -> Split:
        """A split of images that are decoded already."""

        def load(indices: Tensor) -> tuple[ImageSet, int]:
            return (images if len(indices) == len(images) else images.subset(indices)), 0

        return cls(images.labels, load)

    @classmethod
    def read(cls, stream: StreamSet) -> Split:
        """A split of images that are in their files."""
        return cls(stream.labels, stream.load, stream)

    def at(self, indices: Tensor) -> Split:
        """The part of this split at sorted `indices` (M,)."""
        if self.stream is not None:
            return Split.read(self.stream.at(indices))
        return Split(self.labels[indices], lambda chosen: self.load(indices[chosen]))

    def enlarged(self, factor: float) -> Split:
        """The same images, their shorter side `factor` times as long before the centre is cut; if they are in files."""
        if self.stream is None or factor == 1:
            return self
        return Split.read(replace(self.stream, shorter=round(self.stream.size * factor)))


@dataclass(frozen=True, eq=False)
class Source:
    """Opened but not yet decoded data; `size` is the side of its square images.

    `val` is None where it is not asked for, or the data has none. `skipped` counts what could not even be listed;
    `notes` say what a person should know.
    """

    classes: tuple[str, ...]
    size: int
    train: Split
    val: Split | None
    statistics: tuple[Triple, Triple] | None = None
    skipped: int = 0
    notes: tuple[str, ...] = ()

    def resized(self, size: int | None) -> Source:
        """The same source with images (and boxes) resized after decoding, for data of one known size."""
        if size is None or size == self.size:
            return self
        val = None if self.val is None else _resized_split(self.val, size)
        # Statistics of the original size do not hold for smoothed images.
        return replace(
            self, size=size, train=_resized_split(self.train, size), val=val, statistics=None
        )


def _resized_split(split: Split, size: int) -> Split:
    def load(indices: Tensor) -> tuple[ImageSet, int]:
        images, skipped = split.load(indices)
        return resize_images(images, size), skipped

    return Split(split.labels, load)


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
