"""What a transfer method is: a term of the loss with a weight, made from one step's features, logits and labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UserError, check_choice

DECAYS = ("constant", "linear", "cosine", "step")
# `step` drops where the CIFAR recipe drops its learning rate, and by as much: ×0.2 at 60, 120 and 160 of 200 epochs.
_STEPS = (0.3, 0.6, 0.8)
_STEP_RATIO = 0.2

Progress = float | Tensor | None


@dataclass
class Step:
    """One step's quantities, as far as the methods need them."""

    labels: Tensor
    student_logits: Tensor
    teacher_logits: Tensor | None = None
    student_features: list[Tensor] = field(default_factory=list)
    teacher_features: list[Tensor] = field(default_factory=list)


class Method(nn.Module):
    """A term of the loss. `name` is its word in --method, `part` its key in `out.parts`."""

    name: ClassVar[str]
    part: ClassVar[str]
    needs_teacher: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False
    # {the name of another method: {option: what it is, unless given, where that method goes along}}
    beside: ClassVar[dict[str, dict[str, Any]]] = {}
    decay: str = "constant"

    def forward(self, step: Step) -> Tensor:
        """The term before its weight: a scalar in at least float32."""
        raise NotImplementedError

    def weight(self, progress: Progress) -> float | Tensor:
        """What the term is multiplied by."""
        raise NotImplementedError

    def weights(self, progress: Progress) -> dict[str, float]:
        """The weights in effect, by the name of their option (for the log)."""
        raise NotImplementedError

    def cross_entropy_share(self) -> float:
        """The factor that this method leaves to the cross-entropy."""
        return 1.0

    def check(self, pairs: Sequence[tuple[str, str]], student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
        """Raises `UserError` where the features of a dry run do not suit the method."""

    def describe(
        self, pairs: Sequence[tuple[str, str]], student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> list[str]:
        """Lines for the start of a run: what the method does to each pair of layers."""
        return []

    def advise(self, steps: int) -> list[str]:
        """Warnings for a run of so many steps."""
        return []


def decayed(decay: str, progress: Progress) -> float | Tensor:
    """The factor of a schedule: 1 at progress 0; `linear` and `cosine` reach 0 at progress 1.

    Raises:
        UserError: for a decaying schedule without progress, or progress outside [0, 1].
    """
    if decay == "constant":
        return 1.0
    if progress is None:
        raise UserError(
            f"decay={decay!r} needs progress: call transfer(x, y, progress=share of the training that is done)"
        )
    if isinstance(progress, Tensor):
        if decay == "linear":
            return 1 - progress
        if decay == "cosine":
            return (1 + torch.cos(math.pi * progress)) / 2
        passed = sum((progress >= s).to(progress.dtype) for s in _STEPS)
        return _STEP_RATIO**passed
    if not isinstance(progress, (int, float)) or not 0 <= progress <= 1:
        raise UserError(f"progress is {progress!r}: expected the share of the training that is done, in [0, 1]")
    if decay == "linear":
        return 1 - progress
    if decay == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return _STEP_RATIO ** sum(progress >= s for s in _STEPS)


def check_decay(decay: str) -> str:
    check_choice("decay", decay, DECAYS)
    return decay


def check_weight(name: str, value: float) -> float:
    """The value, where it is a finite number ≥ 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise UserError(f"{name} is {value!r}: expected a finite number ≥ 0")
    return float(value)
