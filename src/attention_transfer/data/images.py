"""`ImageSet`: decoded images with labels, class names and boxes; random subsets and statistics."""

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
    """Decoded images with their labels. Raises `UserError` for wrong shapes or dtypes."""

    images: Tensor  # uint8 (N, H, W, 3)
    labels: Tensor  # int64 (N,)
    classes: tuple[str, ...]
    boxes: Tensor | None = None  # int64 (N, 4), x0 y0 x1 y1 half-open; 0 0 0 0 if not known
    files: tuple[str, ...] | None = None  # the name of each image within its data set
    # int64 (N,) on the CPU, the number of each image in its source; 0 to N - 1 by default.
    rows: Tensor = None  # type: ignore[assignment]
    source_size: int = 0  # number of images in the source; N by default
    # Always empty: unreadable images were left out when decoding. See `StreamSet.bad`.
    bad: ClassVar[frozenset[int]] = frozenset()

    def __post_init__(self) -> None:
        if self.rows is None:
            count = len(self.images)
            object.__setattr__(self, "rows", torch.arange(count))
            object.__setattr__(self, "source_size", count)
        # `Augment` reads whole pixels from a flat view.
        object.__setattr__(self, "images", self.images.contiguous())

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return int(self.images.shape[1]), int(self.images.shape[2])

    def subset(self, indices: Tensor) -> ImageSet:
        """The images at `indices` (M,) int64, in that order, copied."""
        indices = indices.to(self.images.device)
        boxes, files = self.boxes, self.files
        if boxes is not None:
            boxes = boxes.index_select(0, indices)
        if files is not None:
            files = tuple(files[i] for i in indices.tolist())
        images, labels = self.images.index_select(0, indices), self.labels.index_select(0, indices)
        rows = self.rows.index_select(0, indices.cpu())
        return replace(self, images=images, labels=labels, boxes=boxes, files=files, rows=rows)

    select = subset  # a `StreamSet` has both: its `select` does not decode

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set with its tensors on `device`."""
        boxes = None if self.boxes is None else self.boxes.to(device)
        # `rows` stays on the CPU, because a store looks them up in its files.
        images, labels = self.images.to(device), self.labels.to(device)
        return replace(self, images=images, labels=labels, boxes=boxes)

    def batch(self, indices: Tensor | Sequence[int] | slice) -> Tensor:
        """Images as uint8 (B, 3, H, W), channels_last in memory; a view if `indices` is a slice."""
        if isinstance(indices, slice):
            return self.images[indices].permute(0, 3, 1, 2)
        rows = torch.as_tensor(indices, dtype=torch.int64, device=self.images.device)
        return self.images.index_select(0, rows).permute(0, 3, 1, 2)


def resize_images(images: ImageSet, size: int) -> ImageSet:
    """Square images resized to `size`, bilinear with antialiasing; boxes are rounded outwards."""
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


def balanced_subset(labels: Tensor, n: int, seed: int) -> Tensor:
    """Sorted indices (min(n, N),) int64 of a random subset of `labels` (N,), balanced over classes.

    If a class has too few images, other classes get more. Raises `UserError` for n < 1.
    """
    if n < 1:
        raise UserError(f"a subset needs at least 1 image, got {n}: ask for 1 or more")
    labels = labels.cpu()
    if n >= len(labels):
        return torch.arange(len(labels))
    generator = make_generator(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    # Each round takes one image of each class that has any left.
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    present, counts = torch.unique(labels, return_counts=True)
    starts = torch.cumsum(counts, 0) - counts
    deal_round = torch.arange(len(labels)) - torch.repeat_interleave(starts, counts)
    # In the last round only some classes get an image: draw them at random.
    turn = torch.repeat_interleave(torch.randperm(len(present), generator=generator), counts)
    dealt = torch.argsort(deal_round * len(present) + turn, stable=True)
    return by_class[dealt[:n]].sort().values


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted indices (rest, cut) of `labels` (N,) with about `fraction` of every class in `cut`."""
    labels = labels.cpu()
    shuffled = torch.randperm(len(labels), generator=make_generator(seed))
    in_cut = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels).tolist():
        members = shuffled[labels[shuffled] == label]
        # A class of two or more images has at least one on each side.
        wanted = min(max(round(len(members) * fraction), 1), len(members) - 1)
        in_cut[members[:wanted]] = True
    return (~in_cut).nonzero().flatten(), in_cut.nonzero().flatten()


def channel_statistics(images: Tensor) -> tuple[Triple, Triple]:
    """Mean and standard deviation of each channel of uint8 images (N, H, W, 3), in [0, 1] units."""
    total = torch.zeros(3, dtype=torch.float64)
    squares = torch.zeros(3, dtype=torch.float64)
    pixels = images.reshape(-1, 3)
    # Chunks of 2^16 pixels fit into the cache; the sums are exact in int64.
    for piece in torch.split(pixels, 1 << 16):
        wide = piece.to(torch.int32)
        total += wide.sum(0)
        squares += (wide * wide).sum(0)
    mean = total / len(pixels)
    # At least one grey level, so that a constant channel is not divided by zero.
    std = (squares / len(pixels) - mean * mean).clamp_min(1.0).sqrt()
    means, stds = (mean / 255).tolist(), (std / 255).tolist()
    return (means[0], means[1], means[2]), (stds[0], stds[1], stds[2])


def make_generator(*key: int) -> torch.Generator:
    """A CPU generator seeded by all of `key`; equal keys give equal draws on every platform.

    `numpy.random.SeedSequence` would give other draws, so old runs could not continue.
    """
    # torch's CPU generator uses 32 bits of its seed, too few to hold the numbers of `key`
    # separately, so splitmix64 (Steele, Lea and Flood, 2014) mixes them.
    state = 0
    for word in key:
        state = (state + word + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state & 0xFFFFFFFF)
