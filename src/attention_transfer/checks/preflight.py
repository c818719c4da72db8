"""A trial step before training, which finds faults that would spoil a run without an error."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..arguments import check_tensor
from ..errors import UserError, shown
from ..taps import unwrap
from ..teacher import TeacherOutput
from ..transfer import Transfer
from .findings import Finding, watch_networks
from .networks import check_frozen, check_layers, check_modes, check_pairs, check_range
from .teacher import check_teacher
from .terms import check_loss
from .unchanged import trial_step

DRY_IMAGES = 32  # enough to show a dead layer or a lost gradient
LEVELS = ("error", "warning", "note")


def preflight(
    transfer: Transfer,
    x: Tensor,
    y: Tensor,
    *,
    images: Iterable[tuple[Tensor, Tensor]] | None = None,
    teacher_accuracy: float | None = None,
    teacher: TeacherOutput | None = None,
) -> list[Finding]:
    """The findings (`level`, `text`) of a trial step, errors first. Call it in training mode.

    It checks modes and frozen parameters, the batch's range, the features and depths of every pair,
    every term of the loss and its gradient, and the teacher's accuracy. Modes, gradients, buffers
    and random states do not change. It costs about as much as an uncompiled step of 100 images.

    Args:
        transfer: student, teacher and methods; a compiled or wrapped one is unwrapped.
        x: a training batch (N, C, H, W) on the transfer's device; the first 32 images are used.
        y: its labels (N,), int64.
        images: labelled validation batches (x, y), balanced over the classes, such as a DataLoader;
            without them the teacher's accuracy is not checked. At most 400 images are used.
        teacher_accuracy: the teacher's known validation accuracy, in [0, 1].
        teacher: the outputs for x of a store in the teacher's place,
            `transfer.store.read(rows, view)`.

    Raises:
        UserError: (a ValueError) for a wrong argument, and for a store without `teacher`.
    """
    plain = unwrap(transfer)
    if not isinstance(plain, Transfer):
        raise UserError(f"transfer is {shown(plain)}: expected a Transfer")
    _check_arguments(x, y, teacher_accuracy)
    teacher = _stored_outputs(plain, teacher)
    x, y = x[:DRY_IMAGES].detach(), y[:DRY_IMAGES]
    findings = [*check_modes(plain), *check_frozen(plain)]
    if text := plain.batch_dependence_warning():
        findings.append(Finding("warning", text))
    with trial_step(plain, x.device):
        try:
            with watch_networks(plain) as io:
                features = plain.features(x, teacher)
        except UserError as error:
            findings.append(Finding("error", f"the networks cannot be run on the batch: {error}"))
        else:
            findings += check_range(x, io)
            findings += check_layers(plain, features, x)
            findings += check_pairs(plain, features, io)
            if teacher is not None and teacher.logits is not None:
                io.outputs["teacher"] = teacher.logits
            findings += check_loss(plain, x, y, io, teacher)
            if images is not None and plain.teacher is not None:
                findings += check_teacher(plain, images, teacher_accuracy, x.device)
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def _stored_outputs(transfer: Transfer, teacher: TeacherOutput | None) -> TeacherOutput | None:
    """The outputs of a store for the first images; None without a store."""
    if transfer.store is None:
        return None
    if teacher is None:
        raise UserError(
            "preflight of a Transfer with a store needs its outputs for x: "
            "teacher=transfer.store.read(rows, view)"
        )
    return teacher.head(DRY_IMAGES)


def _check_arguments(x: Tensor, y: Tensor, teacher_accuracy: float | None) -> None:
    check_tensor(x, "x")
    check_tensor(y, "y")
    if x.ndim != 4 or not x.is_floating_point() or not len(x):
        raise UserError(
            f"preflight got x {x.dtype} {tuple(x.shape)}: "
            "expected floating-point images (N, C, H, W)"
        )
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise UserError(
            f"preflight got y {y.dtype} {tuple(y.shape)}: expected int64 labels ({len(x)},)"
        )
    if teacher_accuracy is None:
        return
    if not isinstance(teacher_accuracy, (int, float)) or not 0 <= teacher_accuracy <= 1:
        raise UserError(
            f"teacher_accuracy is {shown(teacher_accuracy)}: expected a share in [0, 1]"
        )
