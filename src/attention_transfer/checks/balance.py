"""The balance of the terms of the loss: the norm of each term's gradient over the student."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..methods.base import TrainingFraction
from ..taps import unwrap
from ..teacher import TeacherOutput
from ..transfer import Transfer
from .unchanged import trial_step


def term_gradients(
    transfer: Transfer,
    x: Tensor,
    y: Tensor,
    progress: TrainingFraction = None,
    teacher: TeacherOutput | None = None,
) -> dict[str, float]:
    """‖∂term/∂θ‖₂ of each weighted term of the loss; θ are the student's trained weights.

    Modes, gradients, buffers and random states do not change. The cost is an uncompiled step and a
    backward pass for each term.

    Args:
        transfer: student, teacher and methods, in the mode in which they are trained.
        x: images (N, C, H, W).
        y: labels (N,), or probabilities (N, K).
        progress: the share of the training that is done.
        teacher: as in a call of `transfer`.

    Raises:
        UserError: (a ValueError) as a call of `transfer`.
    """
    plain = unwrap(transfer)
    assert isinstance(plain, Transfer)
    parameters = [p for p in plain.student.parameters() if p.requires_grad]
    norms = {}
    with trial_step(plain, x.device), torch.inference_mode(False), torch.enable_grad():
        out = plain(x, y, progress, teacher=teacher)
        for name, term in out.parts.items():
            norms[name] = float(torch.nn.utils.get_total_norm(gradients(term, parameters)))
    return norms


def gradients(term: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradients of a term over the parameters that it depends on."""
    if not term.requires_grad or not parameters:
        return []
    all_gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return [gradient for gradient in all_gradients if gradient is not None]
