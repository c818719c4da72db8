"""Batches of resident images: reflect-pad, random crop and horizontal flip in one gather."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .images import ImageSet, make_generator


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """All random draws of an epoch; `len(plan)` is its number of batches."""

    order: Tensor  # int64 (N,), the images in the order of the batches
    dy: Tensor  # int64 (N,), top of the crop in the padded image, in [0, 2 * crop_padding]
    dx: Tensor  # int64 (N,), its left
    flip: Tensor  # bool (N,)
    batch_size: int
    drop_last: bool = True
    noise: Tensor | None = None  # int64 (N,), seeds the transform of each streamed image

    def __len__(self) -> int:
        whole, rest = divmod(len(self.order), self.batch_size)
        # A set smaller than one batch still makes one batch.
        keep_rest = rest and (whole == 0 or not self.drop_last)
        return whole + bool(keep_rest)


class Augment:
    """Reflect-pads, crops at random, and flips left to right with probability one half.

    `crop_padding` must be below the height and width of the images.
    """

    # Each process makes whole batches, which costs next to nothing, and trains on its share.
    is_sharded = False

    def __init__(self, images: ImageSet, crop_padding: int = 4, flip: bool = True) -> None:
        height, width = images.image_size
        check_padding(crop_padding, height, width)
        self.images = images
        self.crop_padding = crop_padding
        self.flip = flip
        device = images.images.device
        self._pixels = images.images.view(-1, 3)
        # The source row (or column) of each output row (or column), for each offset: a batch only
        # looks these up.
        self._rows = (reflected_positions(height, crop_padding) * width).to(device)
        columns = reflected_positions(width, crop_padding)
        self._columns = torch.stack([columns, columns.flip(1)]).to(device)

    def epoch(self, seed: int, epoch: int, batch_size: int, drop_last: bool = True) -> EpochPlan:
        """Draws an epoch on the CPU, keyed by (seed, epoch), and moves it to the images' device."""
        generator = make_generator(seed, epoch)
        plan = draw_epoch(
            len(self.images), self.crop_padding, self.flip, generator, batch_size, drop_last
        )
        device = self.images.images.device
        order, dy, dx, flip = (t.to(device) for t in (plan.order, plan.dy, plan.dx, plan.flip))
        return EpochPlan(order, dy, dx, flip, batch_size, drop_last)

    def describe(self, batch_size: int) -> str:
        """Where the images are, for the log."""
        return "images in memory"

    def batch(self, plan: EpochPlan, step: int) -> tuple[Tensor, Tensor]:
        """Batch `step`: uint8 (B, 3, H, W), channels_last in memory, and labels int64 (B,)."""
        check_step(plan, step)
        part = slice(step * plan.batch_size, (step + 1) * plan.batch_size)
        images = plan.order[part]
        height, width = self.images.image_size
        rows = self._rows[plan.dy[part]] + (images * (height * width))[:, None]
        columns = self._columns[plan.flip[part].long(), plan.dx[part]]
        # One flat index of whole pixels is faster than advanced indexing with three tensors.
        index = rows[:, :, None] + columns[:, None, :]
        x = self._pixels.index_select(0, index.view(-1)).view(len(images), height, width, 3)
        return x.permute(0, 3, 1, 2), self.images.labels.index_select(0, images)


def check_step(plan: EpochPlan, step: int) -> None:
    """Raises `IndexError` if the epoch has no batch `step`."""
    if not 0 <= step < len(plan):
        raise IndexError(f"step {step} is outside of the epoch's {len(plan)} batches")


def check_padding(crop_padding: int, height: int, width: int) -> None:
    """Raises `UserError` if images of this size are too small for the reflection."""
    if not 0 <= crop_padding < min(height, width):
        raise UserError(
            f"crop_padding is {crop_padding}, but reflection needs 0 <= crop_padding < "
            f"{min(height, width)} for images of {height}x{width}: choose a smaller crop_padding"
        )


def draw_epoch(
    count: int,
    crop_padding: int,
    flip: bool,
    generator: torch.Generator,
    batch_size: int,
    drop_last: bool,
) -> EpochPlan:
    """All random draws of an epoch of `count` images, on the CPU."""
    if batch_size < 1:
        raise UserError(
            f"batch_size must be at least 1, got {batch_size}: choose a larger batch_size"
        )
    if not count:
        raise UserError("cannot plan an epoch of a set without images: open data that has some")
    # Another order of these draws would give other numbers, and old runs could not continue.
    order = torch.randperm(count, generator=generator)
    dy = torch.randint(0, 2 * crop_padding + 1, (count,), generator=generator)
    dx = torch.randint(0, 2 * crop_padding + 1, (count,), generator=generator)
    flips = torch.rand(count, generator=generator) < (0.5 if flip else 0.0)
    noise = torch.randint(0, 1 << 31, (count,), generator=generator)
    return EpochPlan(order, dy, dx, flips, batch_size, drop_last, noise)


def reflected_positions(length: int, padding: int) -> Tensor:
    """Source positions (2 * padding + 1, length) of a crop at each offset; no edge is repeated."""
    position = torch.arange(2 * padding + 1)[:, None] + torch.arange(length) - padding
    last = length - 1
    return last - (last - position.abs()).abs()
