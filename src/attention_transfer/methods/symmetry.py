"""The symmetry norm: the input gradient of a flipped image should be flipped. Needs no teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arguments import check_finite, check_switch
from ..second_order import check_batch, input_gradient
from .base import StepInputs
from .gradient import OVERFLOW, GradientMethod, half_mean_norm


def symmetry_loss(model: nn.Module, x: Tensor, y: Tensor, squared: bool = True) -> Tensor:
    """½ · mean_n ‖J(x) − flip(J(flip(x)))‖², or of the norm not squared; the flip is horizontal.

    Differentiable with respect to the model's parameters (Zagoruyko & Komodakis, ICLR 2017, 3.2).

    Args:
        model: images (N, C, H, W) -> logits (N, K).
        x: images (N, C, H, W).
        y: labels (N,), int64.
        squared: ‖·‖², or ‖·‖, whose gradient at 0 is 0.

    Returns:
        A scalar, float32 or float64.

    Raises:
        UserError: as `input_gradient`.
    """
    squared = check_switch(squared, "squared")
    check_batch(x, y)
    images, labels = torch.cat([x, x.flip(-1)]), torch.cat([y, y])
    j, flipped = input_gradient(model, images, labels, create_graph=True).chunk(2)
    loss = half_mean_norm(j - flipped.flip(-1), squared)
    check_finite(loss, {}, OVERFLOW)
    return loss


class GradientSymmetry(GradientMethod):
    """β · `symmetry_loss` of the student.

    Args:
        beta: β.
        squared: ‖·‖², or ‖·‖.
        decay: as in `ActivationTransfer`.

    Raises:
        UserError: (a ValueError) for a wrong option.
    """

    name = "symmetry"
    needs_flipped = True

    def forward(self, step: StepInputs) -> Tensor:
        assert step.student_gradient is not None
        assert step.flipped_gradient is not None
        return half_mean_norm(step.student_gradient - step.flipped_gradient, self.squared)
