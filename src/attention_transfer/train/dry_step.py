"""The trial step before training: a run's `preflight`."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from ..apply.inference import as_input
from ..checks.preflight import DRY_IMAGES, preflight
from ..checks.teacher import TEACHER_IMAGES
from ..data.dataset import Images
from ..data.images import balanced_subset
from ..errors import UserError
from ..models.network import Network
from ..run_folder import RunFolder
from .assemble import RunComponents
from .regularize import training_mode
from .trainer import Trainer

BATCH = 100


def dry_step(components: RunComponents, trainer: Trainer) -> None:
    """Prints the findings of `preflight`.

    Raises:
        UserError: for a finding that makes training pointless.
    """
    data, device = components.data, trainer.fabric.device
    index = balanced_subset(data.train.labels, DRY_IMAGES, seed=0)
    x, labels = data.train.batch(index), data.train.labels[index]
    teacher = None
    store = components.transfer.store
    if store is not None:
        # A store has outputs for the views, not for the original images.
        plan = trainer.loader.view_plan(0, index, len(index))
        x, labels, rows = trainer.loader.batch(plan, 0)
        teacher = store.read(rows, 0, device)
    training_mode(components.transfer, trainer.options.freeze_bn)
    with trainer.fabric.autocast():
        findings = preflight(
            components.transfer,
            as_input(x.to(device)),
            labels.to(device),
            images=_validation_batches(data.val),
            teacher_accuracy=_recorded_accuracy(components.teacher),
            teacher=teacher,
        )
    for finding in findings:
        if finding.level != "error":
            trainer.progress.say(f"{finding.level}: {finding.text}")
    errors = [finding.text for finding in findings if finding.level == "error"]
    if errors:
        raise UserError("; ".join(errors))


def _validation_batches(images: Images) -> Iterator[tuple[Tensor, Tensor]]:
    """Images balanced over the classes, and over the batches as far as possible."""
    index = balanced_subset(images.labels, TEACHER_IMAGES, seed=0)
    count = math.ceil(len(index) / BATCH)
    for k in range(count):
        part = images.subset(index[k::count])
        yield as_input(part.batch(slice(None))), part.labels


def _recorded_accuracy(teacher: Network | None) -> float | None:
    """The teacher's validation accuracy at the end of its own run, if that is known."""
    if teacher is None or not teacher.folder:
        return None
    summary = RunFolder(teacher.folder).summary() or {}
    accuracy: float | None = (summary.get("final") or {}).get("val_accuracy")
    return accuracy
