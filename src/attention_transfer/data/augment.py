"""Batches of augmented images: reflect-pad, random crop and horizontal flip as one gather."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .images import ImageSet, seeded


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """All that an epoch draws: `order`, `dy`, `dx` (N,) int64 and `flip` (N,) bool; `len(plan)` counts the batches.

    `dy` and `dx` are the crop's top left corner in the padded image, in [0, 2 * crop_padding]; `noise` (N,) int64 seeds
    the transform of each image where images are streamed.
    """

    order: Tensor
    dy: Tensor
    dx: Tensor
    flip: Tensor
    batch_size: int
    drop_last: bool = True
    noise: Tensor | None = None

    def __len__(self) -> int:
        whole, rest = divmod(len(self.order), self.batch_size)
        # A set smaller than one batch still makes one batch.
        return whole + 1 if rest and (whole == 0 or not self.drop_last) else whole


class Augment:
    """Reflect-pads by `crop_padding` pixels, crops at random, flips left to right with probability one half.

    Raises `UserError` where `crop_padding` is not below the image's height and width.
    """

    # Each process makes whole batches, of which the loop takes its share: making them costs next to nothing.
    shares = False

    def __init__(self, images: ImageSet, crop_padding: int = 4, flip: bool = True) -> None:
        height, width = images.image_size
        check_padding(crop_padding, height, width)
        self.images = images
        self.crop_padding = crop_padding
        self.flip = flip
        device = images.images.device
        self._pixels = images.images.view(-1, 3)
        # For each offset, which source row (or column) each output row (or column) reads: a batch only looks these up.
        self._rows = (reflected(height, crop_padding) * width).to(device)
        columns = reflected(width, crop_padding)
        self._columns = torch.stack([columns, columns.flip(1)]).to(device)

    def epoch(self, seed: int, epoch: int, batch_size: int, drop_last: bool = True) -> EpochPlan:
        """Draws one epoch from a CPU generator seeded by (seed, epoch), then moves it to the images' device."""
        device = self.images.images.device
        plan = draw_epoch(
            len(self.images),
            self.crop_padding,
            self.flip,
            seeded(seed, epoch),
            batch_size,
            drop_last,
        )
        order, dy, dx, flip = (
            drawn.to(device) for drawn in (plan.order, plan.dy, plan.dx, plan.flip)
        )
        return EpochPlan(order, dy, dx, flip, batch_size, drop_last)

    def describe(self, batch_size: int) -> str:
        """Where the images are, in a few words."""
        return "images in memory"

    def batch(self, plan: EpochPlan, step: int) -> tuple[Tensor, Tensor]:
        """Batch `step` of `plan`: images uint8 (B, 3, H, W), channels_last in memory, and labels int64 (B,)."""
        if not 0 <= step < len(plan):
            raise IndexError(f"step {step} is outside of the epoch's {len(plan)} batches")
        here = slice(step * plan.batch_size, (step + 1) * plan.batch_size)
        chosen = plan.order[here]
        height, width = self.images.image_size
        rows = self._rows[plan.dy[here]] + (chosen * (height * width))[:, None]
        columns = self._columns[plan.flip[here].long(), plan.dx[here]]
        # Whole pixels (3 bytes) by one flat index: measured faster than advanced indexing with three index tensors.
        where = rows[:, :, None] + columns[:, None, :]
        x = self._pixels.index_select(0, where.view(-1)).view(len(chosen), height, width, 3)
        return x.permute(0, 3, 1, 2), self.images.labels.index_select(0, chosen)


def check_padding(crop_padding: int, height: int, width: int) -> None:
    """Raises `UserError` where images of this size cannot be mirrored so far."""
    if not 0 <= crop_padding < min(height, width):
        raise UserError(
            f"crop_padding is {crop_padding}, but reflection needs 0 <= crop_padding < {min(height, width)} "
            f"for images of {height}x{width}: choose a smaller crop_padding"
        )


def draw_epoch(
    count: int,
    crop_padding: int,
    flip: bool,
    generator: torch.Generator,
    batch_size: int,
    drop_last: bool,
    order: Tensor | None = None,
) -> EpochPlan:
    """All that an epoch of `count` images draws, on the CPU; `order` (count,) takes the place of the drawn one.

    Raises `UserError` for an epoch without images.
    """
    if batch_size < 1:
        raise UserError(
            f"batch_size must be at least 1, got {batch_size}: choose a larger batch_size"
        )
    if not count:
        raise UserError("cannot plan an epoch of a set without images: open data that has some")
    order = torch.randperm(count, generator=generator) if order is None else order
    dy = torch.randint(0, 2 * crop_padding + 1, (count,), generator=generator)
    dx = torch.randint(0, 2 * crop_padding + 1, (count,), generator=generator)
    flips = torch.rand(count, generator=generator) < (0.5 if flip else 0.0)
    noise = torch.randint(0, 1 << 31, (count,), generator=generator)
    return EpochPlan(order, dy, dx, flips, batch_size, drop_last, noise)


def reflected(length: int, padding: int) -> Tensor:
    """Source positions (2 * padding + 1, length) of a crop at each offset, mirrored without repeating the edge."""
    position = torch.arange(2 * padding + 1)[:, None] + torch.arange(length) - padding
    last = length - 1
    return last - (last - position.abs()).abs()
