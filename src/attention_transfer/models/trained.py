"""`TrainedNetwork`: a network with its preprocessing, from images in [0, 1] to logits."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError, first_few
from ..numerics import at_least_float32

# Bicubic resizing exceeds [0, 1] by less than this, normalised images by more.
RANGE_TOLERANCE = 0.25


class Preprocess(nn.Module):
    """Images (N, 3, H, W) in [0, 1] -> the input of a network: resized to `size`, normalised."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], size: tuple[int, int] | None = None
    ):
        super().__init__()
        self.size = size
        # Not persistent: the metadata keeps them, so that the state dict is the network's alone.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.size is not None and tuple(x.shape[-2:]) != self.size:
            # In training, x may be bfloat16, for which the CPU has no antialiased kernel.
            x = at_least_float32(x)
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False, antialias=True)
        return (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)

    @property
    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel."""
        return self.mean.flatten().tolist(), self.std.flatten().tolist()

    def extra_repr(self) -> str:
        mean, std = (", ".join(f"{value:.3g}" for value in values) for values in self.statistics)
        resized = "" if self.size is None else f"resized to {self.size[0]}×{self.size[1]}, "
        return f"{resized}mean ({mean}), std ({std})"


class TrainedNetwork(nn.Module):
    """Images (N, 3, H, W), RGB, in [0, 1] -> logits (N, classes): the preprocessing is inside.

    Images of another size than `image_size` are resized. In `at.stages`, `at.tap` and
    `at.Transfer`, layers have the names that they have in `network`.

    Args:
        network: takes normalised images of `image_size`; its state dict is that of its file.
        preprocess: resizes and normalises the images; its `size` is set.
        class_names: a name for each logit.
    """

    preprocess: Preprocess
    preprocessing_inside = True  # read by taps, which import no model code

    def __init__(self, network: nn.Module, preprocess: Preprocess, class_names: Sequence[str]):
        super().__init__()
        self.preprocess = preprocess
        self.network = network
        self.class_names = tuple(class_names)
        self._checked_first_batch = False
        self.train(network.training)

    @property
    def image_size(self) -> tuple[int, int]:
        """The size (H, W) to which images are resized."""
        assert self.preprocess.size is not None, "a trained network knows its size"
        return self.preprocess.size

    def forward(self, x: Tensor) -> Tensor:
        if not self._checked_first_batch and not torch.compiler.is_compiling():
            # Only once, because reading the range synchronises with the GPU.
            self._checked_first_batch = True
            _check_images(x)
        logits: Tensor = self.network(self.preprocess(x))
        return logits

    def extra_repr(self) -> str:
        height, width = self.image_size
        return (
            f"input: images (N, 3, {height}, {width}), RGB, in [0, 1]; other sizes are resized\n"
            f"output: logits (N, {len(self.class_names)}): {first_few(self.class_names, 4)}\n"
            "normalisation is inside:"
        )


def _check_images(x: Tensor) -> None:
    """Warns about images that are already normalised, or go up to 255."""
    if not x.is_floating_point():
        raise UserError(
            f"images are {x.dtype}: expected floating point in [0, 1] (divide uint8 by 255)"
        )
    with contextlib.suppress(RuntimeError):  # no values under torch.func.vmap, or on meta
        low, high = x.amin().item(), x.amax().item()
        if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
            warnings.warn(
                f"images go from {low:.3g} to {high:.3g}: expected [0, 1]; the network normalises "
                "them itself",
                stacklevel=3,
            )
