"""Full-activation transfer (F-ActT in the paper): the activations themselves, after a learned 1×1 convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import maps
from ..errors import UserError
from .base import BetaMethod, StepInputs


def full_activation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over N and elements of D², D the difference of the activations, flattened and divided by their l2 norms.

    The paper fixes neither axis nor reduction; this is our choice: one norm a sample, over C·H·W.

    Args:
        student: (N, C, H, W), or tokens (N, L, D).
        teacher: the same shape.

    Returns:
        A scalar, float32 or float64.

    Raises:
        UserError: (a ValueError) for other shapes.
    """
    student, teacher = (
        maps.checked(student, "student features"),
        maps.checked(teacher, "teacher features"),
    )
    if student.shape != teacher.shape:
        raise UserError(
            f"full_activation_loss got {tuple(student.shape)} and {tuple(teacher.shape)}: expected one shape "
            "(FullActivationTransfer learns the 1×1 convolution between different channels)"
        )
    ys, yt = (maps.normalize_map(f.flatten(1)) for f in (student, teacher))
    return (ys - yt).square().mean()


class FullActivationTransfer(BetaMethod):
    """β · Σ over pairs of `full_activation_loss`.

    Where channels differ a 1×1 convolution student → teacher is learned along; it is trained and checkpointed with the
    `Transfer`, and no part of the student. Where H×W differ the features are average-pooled to the smaller.

    Args:
        beta: β. The mean is over C·H·W elements, so it is larger than that of attention maps.
        decay: as in `ActivationTransfer`.

    Raises:
        UserError: (a ValueError) for a wrong option.
    """

    name = "full"
    part = "full"
    needs_teacher = True
    needs_features = True
    needs_example = True  # the adapters' sizes

    def __init__(self, beta: float = 1e4, decay: str = "constant"):
        super().__init__(beta, decay)
        self.adapters = nn.ModuleList()

    def forward(self, step: StepInputs) -> Tensor:
        terms = []
        for j, adapter in enumerate(self.adapters):
            s, t = student, teacher = step.student_features[j], step.teacher_features[j]
            s, t = (maps.as_grid(maps.wide(f)) for f in (s, t))
            if s.shape[2:] != t.shape[2:]:
                size = maps.common_grid(student, teacher, f"pair {j}")
                s, t = (F.adaptive_avg_pool2d(f, size) for f in (s, t))
            if isinstance(adapter, nn.Conv2d):
                s = F.conv2d(s, adapter.weight.to(s.dtype))  # the networks may be of any precision
            terms.append(full_activation_loss(s, t))
        return torch.stack(terms).sum()

    def prepare(
        self, pairs: Sequence[tuple[str, str]], student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> None:
        """Makes the adapters, each a convolution where channels differ."""
        if not pairs:
            raise UserError("FullActivationTransfer got no pair of layers: expected at least one")
        self.adapters = nn.ModuleList()
        for (name, aim), s, t in zip(pairs, student, teacher, strict=True):
            features = (
                maps.checked(s, f"student features of {name}"),
                maps.checked(t, f"teacher features of {aim}"),
            )
            given, wanted = (maps.as_grid(f).shape[1] for f in features)
            self.adapters.append(
                nn.Identity()
                if given == wanted
                else nn.Conv2d(given, wanted, 1, bias=False, device=s.device)
            )
        self(
            StepInputs(
                torch.empty(0), student_features=list(student), teacher_features=list(teacher)
            )
        )

    def describe(
        self, pairs: Sequence[tuple[str, str]], student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> list[str]:
        lines = []
        for (s, t), fs, ft, adapter in zip(pairs, student, teacher, self.adapters, strict=True):
            learned = (
                "" if isinstance(adapter, nn.Identity) else ", a learned 1×1 convolution between"
            )
            lines.append(
                f"{s} ← {t}: {tuple(fs.shape[1:])} and {tuple(ft.shape[1:])}{learned}, β = {self.beta:g}"
            )
        return lines
