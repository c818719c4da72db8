"""The random draws of an epoch: the order of the images, and the augmentation of each one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .images import make_generator

if TYPE_CHECKING:
    from .source import Images

# Makes the draws of the views independent of those of an epoch, whose key is (seed, epoch).
VIEWS_KEY = 0x56494557  # "VIEW" in ASCII


class TrainingBatch(NamedTuple):
    """A training batch, or the share of one process."""

    images: Tensor  # uint8 (B, 3, H, W), channels_last in memory
    labels: Tensor  # int64 (B,)
    rows: Tensor  # int64 (B,) on the CPU, the number of each image in its source


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """All random draws of an epoch; `len(plan)` is its number of batches."""

    order: Tensor  # int64 (N,), the images in the order of the batches
    dy: Tensor  # int64 (N,), top of the crop in the padded image, in [0, 2 * crop_padding]
    dx: Tensor  # int64 (N,), left of the crop
    flip: Tensor  # bool (N,)
    noise: Tensor  # int64 (N,) on the CPU, seeds the transform of each streamed image
    rows: Tensor  # int64 (N,) on the CPU, the number of each image in its source
    batch_size: int
    view: int | None = None  # the number of the fixed view that the draws belong to
    # Whether processes split each batch. A last batch that is smaller is then dropped.
    split: bool = True

    def __len__(self) -> int:
        whole, rest = divmod(len(self.order), self.batch_size)
        # A set smaller than one batch makes one batch.
        keep_rest = rest and (whole == 0 or not self.split)
        return whole + bool(keep_rest)

    def to(self, device: torch.device) -> EpochPlan:
        """The same plan with the draws for augmentation on `device`."""
        order, dy, dx, flip = (t.to(device) for t in (self.order, self.dy, self.dx, self.flip))
        return replace(self, order=order, dy=dy, dx=dx, flip=flip)


class EpochPlanner:
    """Plans the epochs of `Augment` and of `Stream`.

    The order depends on (seed, epoch). So do the crops and flips, unless `views` is set: then they
    depend on the view, which is `epoch` mod `views`, and on the image's number in its source.
    Neither the seed nor the selection of images changes a view.

    Draws are made on the CPU and moved to `device`.
    """

    def __init__(
        self,
        images: Images,
        padding: int,
        flip: bool,
        views: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.images, self.views = images, views
        self._padding, self._flip, self._plan_device = padding, flip, torch.device(device)

    def epoch(self, seed: int, epoch: int, batch_size: int) -> EpochPlan:
        """Plans an epoch."""
        generator = make_generator(seed, epoch)
        # Keep the order of these draws: it determines the numbers with which old runs continue.
        order = torch.randperm(len(self.images), generator=generator)
        if self.views is not None:
            return self._plan_view(epoch % self.views, order, batch_size)
        draws = self._draw(len(self.images), generator)
        plan = EpochPlan(order, *draws, self.images.rows[order], batch_size)
        return plan.to(self._plan_device)

    def view_plan(self, view: int, index: Tensor, batch_size: int) -> EpochPlan:
        """Plans view number `view` of all images at `index` (M,), in that order.

        Processes do not split its batches, because that would drop the remainder. With several
        processes, each plans its own share, such as `index[rank::world]`.
        """
        plan = self._plan_view(view, index.cpu(), batch_size)
        return replace(plan, split=False)

    def _plan_view(self, view: int, order: Tensor, batch_size: int) -> EpochPlan:
        rows = self.images.rows[order]
        # Drawn for the whole source, so that an image gets the same draws in any subset.
        draws = self._draw(self.images.source_size, make_generator(VIEWS_KEY, view))
        dy, dx, flip, noise = (draw[rows] for draw in draws)
        plan = EpochPlan(order, dy, dx, flip, noise, rows, batch_size, view)
        return plan.to(self._plan_device)

    def _draw(
        self, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`dy`, `dx`, `flip` and `noise` of an `EpochPlan`, each (count,)."""
        dy = torch.randint(0, 2 * self._padding + 1, (count,), generator=generator)
        dx = torch.randint(0, 2 * self._padding + 1, (count,), generator=generator)
        # Drawn even if no image is flipped, so that `noise` does not depend on --flip.
        flip = torch.rand(count, generator=generator) < (0.5 if self._flip else 0.0)
        noise = torch.randint(0, 1 << 31, (count,), generator=generator)
        return dy, dx, flip, noise
