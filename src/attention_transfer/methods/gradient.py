"""Gradient-based attention transfer: the student's input gradients approach the teacher's."""

from __future__ import annotations

from torch import Tensor

from .. import maps
from ..arguments import check_finite, check_floats, check_same_device, check_switch
from ..errors import UserError
from ..numerics import at_least_float32
from .base import BetaMethod, Pairs, StepInputs, StudentLayers, TeacherLayers

OVERFLOW = "the norm of the input gradients overflows: expected smaller ones"


def gradient_loss(j_student: Tensor, j_teacher: Tensor, squared: bool = True) -> Tensor:
    """½ · mean_n ‖J_S − J_T‖² or, not squared, ½ · mean_n ‖J_S − J_T‖₂, whose gradient at 0 is 0.

    Zagoruyko & Komodakis, ICLR 2017, section 3.2.

    Args:
        j_student: input gradients (N, C, H, W), as `input_gradient` returns them.
        j_teacher: the teacher's input gradients, of the same shape.
        squared: use the form whose derivative the paper prints; False: the loss that it prints.

    Returns:
        A scalar, float32 or float64.

    Raises:
        UserError: (a ValueError) for shapes that differ or are empty, and tensors that are not
            floating-point; in eager mode on a CPU also for values that are not finite.
    """
    loss = gradient_distance(j_student, j_teacher, check_switch(squared, "squared"))
    check_finite(loss, {"j_student": j_student, "j_teacher": j_teacher}, OVERFLOW)
    return loss


def gradient_distance(j_student: Tensor, j_teacher: Tensor, squared: bool) -> Tensor:
    """`gradient_loss` without the check for finite values."""
    check_floats(j_student, "j_student", "(N, C, H, W)")
    check_floats(j_teacher, "j_teacher", "(N, C, H, W)")
    if j_student.shape != j_teacher.shape or j_student.ndim < 2:
        raise UserError(
            f"j_student is {tuple(j_student.shape)}, j_teacher {tuple(j_teacher.shape)}: "
            "expected two (N, C, H, W)"
        )
    check_same_device(j_student, "j_student", j_teacher, "j_teacher")
    return half_mean_norm(j_student - j_teacher, squared)


def half_mean_norm(d: Tensor, squared: bool) -> Tensor:
    """½ · mean_n ‖d_n‖², or of ‖d_n‖, over (N, ...)."""
    d = at_least_float32(d)
    if squared:
        return d.square().sum() / (2 * len(d))
    return maps.row_norm(d.flatten(1)).mean() / 2


class GradientMethod(BetaMethod):
    """β · a term on input gradients, under a schedule.

    It needs second derivatives of the student, and the student's batch normalisation in eval mode,
    because in training mode it couples the samples.
    """

    needs_gradient = True

    def __init__(self, beta: float = 1.0, squared: bool = True, decay: str = "constant"):
        super().__init__(beta, decay)
        self.squared = check_switch(squared, "squared")

    def describe(self, pairs: Pairs, student: StudentLayers, teacher: TeacherLayers) -> list[str]:
        form = "‖·‖²" if self.squared else "‖·‖"
        return [
            f"{self.name}: ½ · mean of {form} of input gradients, β = {self.beta:g} ({self.decay})"
        ]


class GradientTransfer(GradientMethod):
    """β · `gradient_loss` between the student's input gradients and the teacher's.

    Args:
        beta: β.
        squared: ‖·‖² (the derivative that the paper prints), or ‖·‖ (the loss that it prints).
        decay: as in `ActivationTransfer`.

    Raises:
        UserError: (a ValueError) for a wrong option.
    """

    name = "gradient"
    needs_teacher = True
    needs_live_teacher = "it needs the teacher's input gradients, and a store holds none"

    def forward(self, step: StepInputs) -> Tensor:
        assert step.student_gradient is not None
        assert step.teacher_gradient is not None
        return gradient_distance(step.student_gradient, step.teacher_gradient, self.squared)
