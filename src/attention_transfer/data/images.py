"""What the rest of the library sees of the data: image tensors, labels, class names, boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import UserError

Triple = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Decoded images with their labels; a box of (0, 0, 0, 0) means that the object's place is not known.

    Shapes: images (N, H, W, 3) uint8; labels (N,) int64; boxes (N, 4) int64 in pixels as x0, y0, x1, y1 (half-open).
    Raises `UserError` where shapes or dtypes are others.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    boxes: Tensor | None = None
    files: tuple[str, ...] | None = None
    # The bad images of a set are left out when it is decoded; those of a `StreamSet` are found later.
    bad: ClassVar[frozenset[int]] = frozenset()

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[-1] != 3:
            shape = tuple(self.images.shape)
            raise UserError(
                f"images must be uint8 of shape (N, H, W, 3), got {self.images.dtype} {shape}: convert them"
            )
        count = len(self.images)
        if self.labels.dtype != torch.int64 or self.labels.shape != (count,):
            shape = tuple(self.labels.shape)
            raise UserError(
                f"labels must be int64 of shape ({count},), got {self.labels.dtype} {shape}: convert them"
            )
        if self.boxes is not None and (
            self.boxes.dtype != torch.int64 or self.boxes.shape != (count, 4)
        ):
            shape = tuple(self.boxes.shape)
            raise UserError(
                f"boxes must be int64 of shape ({count}, 4), got {self.boxes.dtype} {shape}: convert them"
            )
        if self.files is not None and len(self.files) != count:
            raise UserError(
                f"files must name all {count} images, got {len(self.files)} names: give one name an image"
            )
        object.__setattr__(self, "images", self.images.contiguous())

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return int(self.images.shape[1]), int(self.images.shape[2])

    def subset(self, indices: Tensor) -> ImageSet:
        """The images at `indices` (M,) int64, in that order, as a set of their own."""
        indices = indices.to(self.images.device)
        boxes = None if self.boxes is None else self.boxes.index_select(0, indices)
        files = None if self.files is None else tuple(self.files[i] for i in indices.tolist())
        images, labels = self.images.index_select(0, indices), self.labels.index_select(0, indices)
        return replace(self, images=images, labels=labels, boxes=boxes, files=files)

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set with its tensors on `device`."""
        boxes = None if self.boxes is None else self.boxes.to(device)
        return replace(
            self, images=self.images.to(device), labels=self.labels.to(device), boxes=boxes
        )

    def batch(self, indices: Tensor | Sequence[int] | slice) -> Tensor:
        """Images as uint8 (B, 3, H, W), channels_last in memory; a view where `indices` is a slice, else a copy."""
        if isinstance(indices, slice):
            chosen = self.images[indices]
        else:
            where = torch.as_tensor(indices, dtype=torch.int64, device=self.images.device)
            chosen = self.images.index_select(0, where)
        return chosen.permute(0, 3, 1, 2)


def balanced_subset(labels: Tensor, n: int, seed: int) -> Tensor:
    """Sorted indices (min(n, N),) int64 of a random subset of `labels` (N,) that is as even over classes as can be.

    Where a class has too few, the others fill in. Raises `UserError` for n < 1.
    """
    if n < 1:
        raise UserError(f"a subset needs at least 1 image, got {n}: ask for 1 or more")
    labels = labels.cpu()
    if n >= len(labels):
        return torch.arange(len(labels))
    generator = seeded(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    # Dealing one image a class at a time gives evenness and the filling in at once: rank = the round an image is dealt.
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    present, counts = torch.unique(labels, return_counts=True)
    starts = torch.cumsum(counts, 0) - counts
    rank = torch.arange(len(labels)) - torch.repeat_interleave(starts, counts)
    # The classes that get one more than the others are drawn, not always the first ones.
    turn = torch.repeat_interleave(torch.randperm(len(present), generator=generator), counts)
    dealt = torch.argsort(rank * len(present) + turn, stable=True)
    return by_class[dealt[:n]].sort().values


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted indices (rest, cut) of `labels` (N,) with about `fraction` of every class in `cut`."""
    labels = labels.cpu()
    shuffled = torch.randperm(len(labels), generator=seeded(seed))
    in_cut = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels).tolist():
        members = shuffled[labels[shuffled] == label]
        # A class with two or more images is on both sides, or its accuracy could not be told.
        wanted = min(max(round(len(members) * fraction), 1), len(members) - 1)
        in_cut[members[:wanted]] = True
    return (~in_cut).nonzero().flatten(), in_cut.nonzero().flatten()


def channel_statistics(images: Tensor) -> tuple[Triple, Triple]:
    """Mean and standard deviation of each channel of uint8 images (N, H, W, 3), in [0, 1] units."""
    total = torch.zeros(3, dtype=torch.float64)
    squares = torch.zeros(3, dtype=torch.float64)
    pixels = images.reshape(-1, 3)
    # 2^16 pixels a piece: their sum of squares (below 2^32) is exact in int64 and the piece stays in the cache.
    for piece in torch.split(pixels, 1 << 16):
        wide = piece.to(torch.int32)
        total += wide.sum(0)
        squares += (wide * wide).sum(0)
    mean = total / len(pixels)
    # A channel without any variation would divide by zero: one grey level is the least that 8 bits can tell.
    std = (squares / len(pixels) - mean * mean).clamp_min(1.0).sqrt()
    return triple((mean / 255).tolist()), triple((std / 255).tolist())


def triple(values: Sequence[float]) -> Triple:
    """Three floats as a tuple of three."""
    red, green, blue = values
    return float(red), float(green), float(blue)


def seeded(*words: int) -> torch.Generator:
    """A CPU generator seeded by all of `words`; equal words give equal draws on every platform."""
    # torch's CPU generator looks at 32 bits only, so the words are mixed (splitmix64), not packed side by side.
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state & 0xFFFFFFFF)
