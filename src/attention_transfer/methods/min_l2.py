"""min-l2 (Drucker & LeCun, 1992): small input gradients, so that the loss is robust to noise."""

from __future__ import annotations

from torch import Tensor, nn

from ..arguments import check_finite
from ..second_order import input_gradient
from .base import StepInputs
from .gradient import OVERFLOW, GradientMethod, half_mean_norm


def gradient_norm_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """½ · mean_n ‖J‖², differentiable with respect to the model's parameters. Needs no teacher.

    J are the input gradients (Drucker & LeCun, "Improving generalization performance using double
    backpropagation", 1992).

    Args:
        model: images (N, C, H, W) -> logits (N, K).
        x: images (N, C, H, W).
        y: labels (N,), int64.

    Returns:
        A scalar, float32 or float64.

    Raises:
        UserError: as `input_gradient`.
    """
    loss = half_mean_norm(input_gradient(model, x, y, create_graph=True), squared=True)
    check_finite(loss, {}, OVERFLOW)
    return loss


class GradientNorm(GradientMethod):
    """β · `gradient_norm_loss` of the student.

    Args:
        beta: β.
        decay: as in `ActivationTransfer`.

    Raises:
        UserError: (a ValueError) for a wrong option.
    """

    name = "min-l2"

    # No `squared`: the command takes the options of a method from this signature.
    def __init__(self, beta: float = 1.0, decay: str = "constant"):
        super().__init__(beta, decay=decay)

    def forward(self, step: StepInputs) -> Tensor:
        assert step.student_gradient is not None
        return half_mean_norm(step.student_gradient, squared=True)
