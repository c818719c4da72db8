"""Full-activation transfer (the paper's F-ActT): activations after a learned 1×1 convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import maps
from ..arguments import check_finite, check_same_device
from ..errors import UserError
from ..numerics import at_least_float32
from .auto import PairedBetaMethod
from .base import Pairs, StepInputs, StudentLayers, TeacherLayers


def full_activation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of D² over N and elements; D is the difference of the l2-normalised activations.

    The paper's full-activation transfer (F-ActT, Table 1). The paper states neither axis nor
    reduction: this package uses one norm for each sample, over C·H·W.

    Args:
        student: (N, C, H, W), or tokens (N, L, D).
        teacher: the same shape.

    Returns:
        A scalar, float32 or float64.

    Raises:
        UserError: (a ValueError) for other shapes; in eager mode on a CPU also for features that
            are not finite.
    """
    loss = normalised_difference(student, teacher)
    inputs = {"student features": student, "teacher features": teacher}
    check_finite(loss, inputs, "the features overflow: expected smaller values")
    return loss


def normalised_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """`full_activation_loss` without the check for finite features."""
    student = maps.checked_features(student, "student features")
    teacher = maps.checked_features(teacher, "teacher features")
    if student.shape != teacher.shape:
        raise UserError(
            f"student features are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: "
            "expected the same shape (FullActivationTransfer learns a 1×1 convolution if the "
            "channels differ)"
        )
    check_same_device(student, "student features", teacher, "teacher features")
    d = maps.normalize_map(student.flatten(1)) - maps.normalize_map(teacher.flatten(1))
    return d.square().mean()


class FullActivationTransfer(PairedBetaMethod):
    """β · Σ over pairs of `full_activation_loss`.

    If the channels of a pair differ, a 1×1 convolution student → teacher is learned as well; it is
    trained and checkpointed with the `Transfer` and is not part of the student. If H×W differ, the
    features are average-pooled to the smaller size.

    Args:
        beta: β. The mean is over C·H·W elements, so β is larger than for attention maps. With
            "auto" the term is 3 · the unexplained share of the variance of the teacher's normalised
            activations, as in `ActivationTransfer`.
        decay: as in `ActivationTransfer`.

    Raises:
        UserError: (a ValueError) for a wrong option.
    """

    name = "full"
    needs_teacher = True
    needs_features = True
    needs_live_teacher = "it compares whole features, and a store has only their maps"
    needs_example = True  # for the sizes of the adapters
    what = "activation"

    def __init__(self, beta: float | str = 1e4, decay: str = "constant"):
        super().__init__(beta, decay)
        self.adapters = nn.ModuleList()

    @property
    def belongs_to_a_transfer(self) -> bool:
        return bool(self.adapters)

    def forward(self, step: StepInputs) -> Tensor:
        terms = []
        for j, adapter in enumerate(self.adapters):
            student, teacher = step.student_features[j], step.teacher_features[j]
            assert isinstance(teacher, Tensor), "no store: needs_live_teacher"
            s, t = _on_one_grid(student, teacher, f"pair {j}")
            if isinstance(adapter, nn.Conv2d):
                # The student's features and the adapter may differ in precision.
                s = F.conv2d(s, adapter.weight.to(s.dtype))
            term = normalised_difference(s, t)
            if (betas := self.pair_betas()) is not None:
                term = betas[j] * term
            terms.append(term)
        step.pair_terms[self.name] = [term.detach() for term in terms]
        return torch.stack(terms).sum()

    def prepare(self, pairs: Pairs, student: StudentLayers, teacher: TeacherLayers) -> None:
        """Makes the adapters: a convolution for each pair whose channels differ."""
        if not pairs:
            raise UserError("FullActivationTransfer got no pair of layers: expected at least one")
        self.adapters = nn.ModuleList()
        for (student_layer, teacher_layer), s, t in zip(pairs, student, teacher, strict=True):
            assert isinstance(t, Tensor), "no store: needs_live_teacher"
            maps.checked_features(s, f"student features of {student_layer}")
            maps.checked_features(t, f"teacher features of {teacher_layer}")
            in_channels, out_channels = maps.as_grid(s).shape[1], maps.as_grid(t).shape[1]
            adapter: nn.Module = nn.Identity()
            if in_channels != out_channels:
                adapter = nn.Conv2d(in_channels, out_channels, 1, bias=False, device=s.device)
            self.adapters.append(adapter)
        if self.is_auto:
            self._set_auto_betas(pairs, student, teacher)
        # A trial step raises if the features do not fit together.
        labels = torch.empty(0)  # not read
        self(StepInputs(labels, student_features=list(student), teacher_features=list(teacher)))

    def _set_auto_betas(self, pairs: Pairs, student: StudentLayers, teacher: TeacherLayers) -> None:
        spreads, units = [], []
        for j, (fs, ft) in enumerate(zip(student, teacher, strict=True)):
            assert isinstance(ft, Tensor), "no store: needs_live_teacher"
            features = _on_one_grid(fs, ft, f"pair {j}")[1]
            y = maps.normalize_map(features.flatten(1)).cpu().double()  # MPS has no float64
            freedom = max(1, len(y) - 1)
            spreads.append(float((y - y.mean(0)).square().sum() / 2 / freedom))
            units.append(y.shape[1] / 2)  # the loss is a mean over the elements
        self.set_auto_betas(pairs, student, spreads, units)

    def describe(self, pairs: Pairs, student: StudentLayers, teacher: TeacherLayers) -> list[str]:
        lines = []
        described = zip(pairs, student, teacher, self.adapters, strict=True)
        for j, ((s, t), fs, ft, adapter) in enumerate(described):
            line = f"{s} ← {t}: {tuple(fs.shape[1:])} and {tuple(ft.shape[1:])}"
            if not isinstance(adapter, nn.Identity):
                line += ", joined by a learned 1×1 convolution"
            beta = self.beta
            if self.is_auto:
                beta = self._auto_betas[j]
            line += f", β = {beta:.5g}"
            if j in self.left_out:
                line += f"; left out: {self.left_out[j]}"
            lines.append(line)
        return lines


def _on_one_grid(student: Tensor, teacher: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The features (N, C, H, W) in at least float32, average-pooled to the smaller size."""
    s = maps.as_grid(at_least_float32(student))
    t = maps.as_grid(at_least_float32(teacher))
    if s.shape[2:] == t.shape[2:]:
        return s, t
    size = maps.common_grid(student, teacher, name)
    return F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size)
