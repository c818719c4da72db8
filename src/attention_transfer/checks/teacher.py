"""Checks the teacher's accuracy against guessing, and against the end of its own run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..taps import evaluating
from ..transfer import Transfer
from .findings import Finding, watch_networks

TEACHER_IMAGES = 400
TEACHER_CHUNK = 25  # enough images to recognise a good teacher
GUESSING = 0.01  # warn if guessing would be as accurate with more than this probability
NOT_GUESSING = 1e-6  # stop early below this; far below GUESSING, as it is tested after each chunk
TOLERANCE = 0.05  # allowed loss of accuracy against the teacher's own run, besides sampling error

Batches = Iterable[tuple[Tensor, Tensor]]


def check_teacher(
    transfer: Transfer, images: Batches, expected: float | None, device: torch.device
) -> list[Finding]:
    """The teacher's accuracy on at most 400 labelled images, against chance and `expected`."""
    assert transfer.teacher is not None
    correct = total = classes = 0
    with evaluating(transfer.teacher), watch_networks(transfer) as io:
        for x, y in _chunks(images):
            transfer.features(x.to(device))
            student_classes, classes = io.classes.get("student"), io.classes.get("teacher", 0)
            if classes < 2:
                return []
            if classes != student_classes:
                text = f"its logits have {classes} classes, the student's {student_classes}"
                return [Finding("note", f"the teacher's accuracy is not checked: {text}")]
            correct += int((io.outputs["teacher"].argmax(1) == y.to(device)).sum())
            total += len(y)
            as_good = correct / total >= (expected or 0.0) - TOLERANCE
            if as_good and at_least(correct, total, 1 / classes) < NOT_GUESSING:
                break
    if not total:
        return []
    return list(_accuracy_findings(correct, total, classes, expected))


def _chunks(images: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    left = TEACHER_IMAGES
    for x, y in images:
        x, y = x[:left], y[:left]
        left -= len(y)
        # Every count-th image: if the batch is sorted by class, the first ones have one class.
        count = math.ceil(len(y) / TEACHER_CHUNK)
        for k in range(count):
            yield x[k::count], y[k::count]
        if left <= 0:
            return


def _accuracy_findings(
    correct: int, total: int, classes: int, expected: float | None
) -> Iterator[Finding]:
    accuracy, chance = correct / total, 1 / classes
    text = f"the teacher is right for {correct} of {total} validation images"
    # With few images even a good teacher fails the test, so its accuracy must also be low.
    if at_least(correct, total, chance) > GUESSING and accuracy < (1 + chance) / 2:
        yield Finding(
            "warning",
            f"{text}, no more than guessing among {classes} classes gives: "
            "are its weights, its normalisation and the order of the classes right?",
        )
    elif expected is None or accuracy >= expected - TOLERANCE:
        return
    elif at_least(total - correct, total, 1 - expected) < GUESSING:
        text = f"{text} ({accuracy:.1%}), but was for {expected:.1%} in its own run"
        yield Finding("warning", f"{text}: is it the same data and normalisation?")


def at_least(successes: int, total: int, chance: float) -> float:
    """P(X ≥ successes) for X of Binomial(total, chance)."""
    from scipy.special import bdtrc

    return float(bdtrc(successes - 1, total, chance))
