"""A transfer method: a weighted term of the loss, from a step's features, logits and labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..arguments import check_tensor, check_weight
from ..errors import UserError, check_choice, shown
from ..map_inputs import StoredMap
from ..map_options import MapOptions
from ..options import AUTO
from .options import DECAYS

# `step` drops together with the learning rate of the CIFAR recipe: epochs 60, 120 and 160 of 200.
_STEPS = (0.3, 0.6, 0.8)
_STEP_RATIO = 0.2
# `warm-up` rises from 0 over this share of the training.
WARM_UP = 0.1

TrainingFraction = float | Tensor | None
Pairs = Sequence[tuple[str, str]]
# The features of the paired layers.
StudentLayers = Sequence[Tensor]
TeacherLayers = Sequence[Tensor | StoredMap]


@dataclass
class StepInputs:
    """The inputs of the methods in one step; fields that no method needs are empty.

    The input gradients J are (N, C, H, W) like the images; `flipped_gradient` is flip(J(flip(x)))
    of the student. With a store, the teacher's features are `StoredMap`s.
    """

    labels: Tensor
    student_logits: Tensor | None = None
    teacher_logits: Tensor | None = None
    student_features: StudentLayers = ()
    teacher_features: TeacherLayers = ()
    student_gradient: Tensor | None = None
    teacher_gradient: Tensor | None = None
    flipped_gradient: Tensor | None = None
    # {method: a scalar for each pair}, set by the methods, to name the pair that is not finite.
    pair_terms: dict[str, list[Tensor]] = field(default_factory=dict)


class Method(nn.Module):
    """A term of the loss. `name` is its name in --method, and its key in `out.parts`."""

    name: ClassVar[str]
    needs_teacher: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False
    # J of the student, and J of the teacher if the method needs a teacher.
    needs_gradient: ClassVar[bool] = False
    needs_flipped: ClassVar[bool] = False
    needs_example: bool = False
    has_auto_beta: ClassVar[bool] = False  # whether β may be "auto"
    # Why a store of the teacher's maps and logits is not enough; None if it is.
    needs_live_teacher: ClassVar[str | None] = None
    # The attention maps that it reads from a store, if any.
    map_options: MapOptions | None = None
    # (student, teacher): whether it reads attention instead of features.
    reads_attention: tuple[bool, bool] = (False, False)
    # {name of another method: {option: its default if both are chosen}}
    defaults_with: ClassVar[dict[str, dict[str, Any]]] = {}
    decay: str = "constant"
    # Whether a student may begin to learn the labels late, even if the weight is right.
    starts_slowly: bool = False

    @property
    def belongs_to_a_transfer(self) -> bool:
        """Whether it has state for the pairs of one `Transfer`, such as adapters."""
        return False

    def forward(self, step: StepInputs) -> Tensor:
        """The term before its weight: a scalar in at least float32."""
        raise NotImplementedError

    def weight(self, progress: TrainingFraction) -> float | Tensor:
        """The factor of the term."""
        raise NotImplementedError

    def weights(self, progress: TrainingFraction) -> dict[str, float]:
        """The weights in effect, by the names of their options (for the log)."""
        raise NotImplementedError

    def cross_entropy_share(self, progress: TrainingFraction = None) -> float | Tensor:
        """The factor that this method leaves to the cross-entropy."""
        return 1.0

    def weight_advice(self, change: str) -> str:
        """Advice for a weight that is too small or too large; `change` is "raise" or "lower"."""
        return f"{change} its weight"

    def prepare(self, pairs: Pairs, student: StudentLayers, teacher: TeacherLayers) -> None:
        """Raises `UserError` if the features of the example do not suit the method."""

    def describe(self, pairs: Pairs, student: StudentLayers, teacher: TeacherLayers) -> list[str]:
        """Lines for the start of a run: what the method does to each pair of layers."""
        return []

    def warnings(self, steps: int) -> list[str]:
        """Warnings for a run of `steps` steps."""
        return []


class BetaMethod(Method):
    """A method whose weight is β under a schedule.

    Raises:
        UserError: (a ValueError) unless β is a finite number ≥ 0 and the schedule is known.
    """

    def __init__(self, beta: float | str, decay: str):
        super().__init__()
        check_choice("decay", decay, DECAYS)
        self.decay = decay
        # Under "auto" each pair has its own weight, and β is 1.
        self.is_auto = self.has_auto_beta and beta == AUTO
        self.beta = 1.0 if self.is_auto else check_weight(beta, "beta")
        self.starts_slowly = self.is_auto

    def weight(self, progress: TrainingFraction) -> float | Tensor:
        return self.beta * schedule_factor(self.decay, progress)

    def weights(self, progress: TrainingFraction) -> dict[str, float]:
        return {"beta": float(self.weight(progress))}

    def weight_advice(self, change: str) -> str:
        if not self.has_auto_beta:
            return f"{change} --beta"
        if not self.is_auto:
            return f"{change} --beta, or leave it to --beta auto"
        if change == "raise":
            return "--beta auto gave the β in metrics.jsonl: give --beta a larger number"
        return (
            "train longer (--epochs); if that does not help, give --beta a smaller number than the "
            "β of auto, which is in metrics.jsonl"
        )


def can_learn_from_store(methods: Sequence[Method]) -> bool:
    """Whether some methods need a teacher, and a store of its maps and logits is enough for all."""
    teacher_methods = [method for method in methods if method.needs_teacher]
    for method in teacher_methods:
        reads_features = method.needs_features and method.map_options is None
        if method.needs_live_teacher is not None or reads_features:
            return False
    return bool(teacher_methods)


def schedule_factor(decay: str, progress: TrainingFraction) -> float | Tensor:
    """The factor of a schedule: 1 at progress 0; at 1, `linear` and `cosine` give 0, `step` 0.008.

    `warm-up` multiplies it by a linear rise over the first tenth of the training. A tensor outside
    [0, 1] is clamped, because a check of its value would wait for the device.

    Raises:
        UserError: for a schedule without progress, a number outside [0, 1], or a tensor that is
            not 0-d.
    """
    if progress is None:
        if decay == "constant":
            return 1.0
        raise UserError(
            f"decay={decay!r} needs progress: call transfer(x, y, progress=...) with the share of "
            "the training that is done"
        )
    if isinstance(progress, Tensor):
        check_tensor(progress, "progress")
        if progress.ndim:
            raise UserError(f"progress is a tensor {tuple(progress.shape)}: expected a 0-d one")
        progress = progress.clamp(0, 1)
    elif not isinstance(progress, (int, float)) or not 0 <= progress <= 1:
        raise UserError(
            f"progress is {shown(progress)}: "
            "expected the share of the training that is done, in [0, 1]"
        )
    if decay == "constant":
        return 1.0
    fall = decay.removeprefix("warm-up").removeprefix("+")
    factor = _decay_factor(fall, progress)
    if fall == decay:
        return factor
    rise = progress / WARM_UP
    # A tensor stays a tensor: the progress of a compiled step is data, not a constant.
    if isinstance(rise, Tensor):
        return rise.clamp(max=1) * factor
    return min(rise, 1.0) * factor


def _decay_factor(decay: str, progress: float | Tensor) -> float | Tensor:
    if decay == "linear":
        return 1 - progress
    if decay == "cosine":
        angle = math.pi * progress
        cosine = torch.cos(angle) if isinstance(angle, Tensor) else math.cos(angle)
        return (1 + cosine) / 2
    if decay == "step":
        drops = sum(progress >= step for step in _STEPS)
        if isinstance(progress, Tensor):
            drops = torch.as_tensor(drops).to(progress.dtype)
        return _STEP_RATIO**drops
    return 1.0
