"""What a transfer method is: a term of the loss with a weight, made from one step's features, logits and labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UserError, check_choice

_FALLS = ("constant", "linear", "cosine", "step")
DECAYS = (*_FALLS, "warm-up", *(f"warm-up+{fall}" for fall in _FALLS[1:]))
# `step` drops where the CIFAR recipe drops its learning rate, and by as much: ×0.2 at 60, 120 and 160 of 200 epochs.
_STEPS = (0.3, 0.6, 0.8)
_STEP_RATIO = 0.2
# `warm-up` rises from 0 over this share of the training.
WARM_UP = 0.1

Progress = float | Tensor | None


@dataclass
class StepInputs:
    """One step's quantities, as far as the methods need them.

    The input gradients J are (N, C, H, W) like the images; `flipped_gradient` is flip(J(flip(x))) of the student.
    """

    labels: Tensor
    student_logits: Tensor | None = None
    teacher_logits: Tensor | None = None
    student_features: list[Tensor] = field(default_factory=list)
    teacher_features: list[Tensor] = field(default_factory=list)
    student_gradient: Tensor | None = None
    teacher_gradient: Tensor | None = None
    flipped_gradient: Tensor | None = None


class Method(nn.Module):
    """A term of the loss. `name` is its word in --method, `part` its key in `out.parts`."""

    name: ClassVar[str]
    part: ClassVar[str]
    needs_teacher: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = (
        False  # J of the student, and of the teacher where one is needed
    )
    needs_flipped: ClassVar[bool] = False
    needs_example: ClassVar[bool] = False
    # {the name of another method: {option: what it is, unless given, where that method goes along}}
    beside: ClassVar[dict[str, dict[str, Any]]] = {}
    decay: str = "constant"

    def forward(self, step: StepInputs) -> Tensor:
        """The term before its weight: a scalar in at least float32."""
        raise NotImplementedError

    def weight(self, progress: Progress) -> float | Tensor:
        """What the term is multiplied by."""
        raise NotImplementedError

    def weights(self, progress: Progress) -> dict[str, float]:
        """The weights in effect, by the name of their option (for the log)."""
        raise NotImplementedError

    def cross_entropy_share(self, progress: Progress = None) -> float | Tensor:
        """The factor that this method leaves to the cross-entropy."""
        return 1.0

    def prepare(
        self, pairs: Sequence[tuple[str, str]], student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> None:
        """Raises `UserError` where the features of a dry run do not suit the method."""

    def describe(
        self, pairs: Sequence[tuple[str, str]], student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> list[str]:
        """Lines for the start of a run: what the method does to each pair of layers."""
        return []

    def advise(self, steps: int) -> list[str]:
        """Warnings for a run of so many steps."""
        return []


class BetaMethod(Method):
    """A method whose weight is β under a schedule.

    Raises:
        UserError: (a ValueError) for a β that is no finite number ≥ 0, or an unknown schedule.
    """

    def __init__(self, beta: float, decay: str):
        super().__init__()
        self.beta = check_weight("beta", beta)
        self.decay = check_decay(decay)

    def weight(self, progress: Progress) -> float | Tensor:
        return self.beta * decayed(self.decay, progress)

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"beta": float(self.weight(progress))}


def decayed(decay: str, progress: Progress) -> float | Tensor:
    """The factor of a schedule: 1 at progress 0; `linear` and `cosine` reach 0 at progress 1, `step` 0.008.

    With `warm-up` it rises linearly over the first tenth of the training, times what the rest of its name says.

    Raises:
        UserError: for a schedule without progress, or progress outside [0, 1].
    """
    if decay == "constant":
        return 1.0
    if progress is None:
        raise UserError(
            f"decay={decay!r} needs progress: call transfer(x, y, progress=share of the training that is done)"
        )
    if not isinstance(progress, Tensor) and (
        not isinstance(progress, (int, float)) or not 0 <= progress <= 1
    ):
        raise UserError(
            f"progress is {progress!r}: expected the share of the training that is done, in [0, 1]"
        )
    factor: float | Tensor = 1.0
    if decay.startswith("warm-up"):
        risen = progress / WARM_UP
        factor = risen.clamp(max=1) if isinstance(risen, Tensor) else min(risen, 1.0)
    return factor * _fallen(decay.removeprefix("warm-up").removeprefix("+"), progress)


def _fallen(decay: str, progress: float | Tensor) -> float | Tensor:
    if decay == "linear":
        return 1 - progress
    if decay == "cosine":
        turned = math.pi * progress
        return (1 + (torch.cos(turned) if isinstance(turned, Tensor) else math.cos(turned))) / 2
    if decay == "step":
        if isinstance(progress, Tensor):
            return _STEP_RATIO ** sum((progress >= s).to(progress.dtype) for s in _STEPS)
        return _STEP_RATIO ** sum(progress >= s for s in _STEPS)
    return 1.0


def check_decay(decay: str) -> str:
    check_choice("decay", decay, DECAYS)
    return decay


def check_weight(name: str, value: float) -> float:
    """The value, where it is a finite number ≥ 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise UserError(f"{name} is {value!r}: expected a finite number ≥ 0")
    return float(value)
