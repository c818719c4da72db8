"""Knowledge distillation (Hinton et al., 2015): (1 − α)·CE + α·T²·KL(teacher‖student)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from ..arguments import check_finite, check_floats, check_same_device
from ..errors import UserError, check_choice, shown
from ..numerics import at_least_float32, check_logits
from ..options import checked
from .base import Method, StepInputs, TrainingFraction, schedule_factor
from .options import DECAYS, DistillationOptions


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """T² · KL(softmax(teacher/T) ‖ softmax(student/T)), averaged over the batch.

    Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015.

    Args:
        student_logits: (N, K).
        teacher_logits: (N, K).
        temperature: T > 0.

    Returns:
        A scalar, float32 or float64 (the logits are converted to at least float32).

    Raises:
        UserError: (a ValueError) unless both shapes are (N, K) and the temperature is above 0; in
            eager mode on a CPU also for logits that are not finite.
    """
    loss = softened_divergence(student_logits, teacher_logits, temperature)
    inputs = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_finite(loss, inputs, f"temperature is {temperature:g}: the logits / T overflow")
    return loss


def softened_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> Tensor:
    """`kd_loss` without the check for finite logits."""
    check_floats(student_logits, "student_logits", "(N, K)")
    check_floats(teacher_logits, "teacher_logits", "(N, K)")
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise UserError(
            f"student_logits are {tuple(student_logits.shape)}, "
            f"teacher_logits {tuple(teacher_logits.shape)}: expected both (N, K)"
        )
    check_same_device(student_logits, "student_logits", teacher_logits, "teacher_logits")
    if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise UserError(f"temperature is {shown(temperature)}: expected a number > 0")
    # Both as logarithms: the softmax of an unlikely class underflows to 0.
    log_p = F.log_softmax(at_least_float32(student_logits) / temperature, 1)
    log_q = F.log_softmax(at_least_float32(teacher_logits) / temperature, 1)
    # The gradients shrink by 1/T²; with the factor T² the same α suits every T.
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


class KnowledgeDistillation(Method):
    """α · `kd_loss`; the cross-entropy has the weight 1 − α.

    Args:
        alpha: α in [0, 1].
        temperature: T > 0.
        decay: the schedule of α, as in `ActivationTransfer`; the cross-entropy gains what α loses.

    Raises:
        UserError: (a ValueError) for values out of range.
    """

    name = "kd"
    needs_teacher = True
    starts_slowly = True

    def __init__(self, alpha: float = 0.9, temperature: float = 4.0, decay: str = "constant"):
        super().__init__()
        options = checked(DistillationOptions(alpha, temperature))
        self.alpha, self.temperature = options.alpha, options.temperature
        check_choice("decay", decay, DECAYS)
        self.decay = decay

    def forward(self, step: StepInputs) -> Tensor:
        assert step.student_logits is not None
        # `Transfer` does not check them: other methods accept any output of the teacher.
        teacher_logits = check_logits(step.teacher_logits, "the teacher")
        return softened_divergence(step.student_logits, teacher_logits, self.temperature)

    def weight(self, progress: TrainingFraction) -> float | Tensor:
        return self.alpha * schedule_factor(self.decay, progress)

    def weights(self, progress: TrainingFraction) -> dict[str, float]:
        return {"alpha": float(self.weight(progress))}

    def cross_entropy_share(self, progress: TrainingFraction = None) -> float | Tensor:
        return 1 - self.weight(progress)

    def weight_advice(self, change: str) -> str:
        if change == "raise":
            return "raise --alpha"
        return "train longer (--epochs); if that does not help, lower --alpha"
