"""Batches of resident images: reflect-pad, random crop and horizontal flip in one gather."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from .images import ImageSet
from .plan import EpochPlan, EpochPlanner, TrainingBatch


class Augment(EpochPlanner):
    """Reflect-pads, crops at random, and flips left to right with probability one half.

    `crop_padding` must be below the height and width of the images.
    """

    # Each process makes whole batches, which is cheap, and trains on its share.
    is_sharded = False
    images: ImageSet

    def __init__(
        self,
        images: ImageSet,
        crop_padding: int = 4,
        flip: bool = True,
        views: int | None = None,
    ) -> None:
        height, width = images.image_size
        check_padding(crop_padding, height, width)
        device = images.images.device
        super().__init__(images, crop_padding, flip, views, device)
        self._pixels = images.images.view(-1, 3)
        # The source row (or column) of each output row (or column), for each offset: a batch only
        # looks these up.
        self._row_starts = (reflected_positions(height, crop_padding) * width).to(device)
        columns = reflected_positions(width, crop_padding)
        self._columns = torch.stack([columns, columns.flip(1)]).to(device)

    def describe(self, batch_size: int) -> str:
        """A phrase for the log about where the images are."""
        return "images in memory"

    def batch(self, plan: EpochPlan, step: int) -> TrainingBatch:
        """Batch `step`."""
        part = slice(step * plan.batch_size, (step + 1) * plan.batch_size)
        images = plan.order[part]
        height, width = self.images.image_size
        starts = self._row_starts[plan.dy[part]] + (images * (height * width))[:, None]
        columns = self._columns[plan.flip[part].long(), plan.dx[part]]
        # One flat index of whole pixels is faster than advanced indexing with three tensors.
        index = starts[:, :, None] + columns[:, None, :]
        x = self._pixels.index_select(0, index.view(-1)).view(len(images), height, width, 3)
        labels = self.images.labels.index_select(0, images)
        return TrainingBatch(x.permute(0, 3, 1, 2), labels, plan.rows[part])


def check_padding(crop_padding: int, height: int, width: int) -> None:
    """Raises `UserError` if images of this size are too small for the reflection."""
    if not 0 <= crop_padding < min(height, width):
        raise UserError(
            f"crop_padding is {crop_padding}, but reflection needs 0 <= crop_padding < "
            f"{min(height, width)} for images of {height}x{width}: choose a smaller crop_padding"
        )


def reflected_positions(length: int, padding: int) -> Tensor:
    """Source positions (2 * padding + 1, length) of a crop at each offset; no edge is repeated."""
    position = torch.arange(2 * padding + 1)[:, None] + torch.arange(length) - padding
    last = length - 1
    # The inner absolute value reflects at 0, the outer one at `last`.
    return last - (last - position.abs()).abs()
