"""Confusions between classes, before and after transfer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .formats import signed
from .load_run import StoredPredictions
from .rows import SettingRow

if TYPE_CHECKING:
    import numpy as np

LARGEST_MATRIX = 20  # classes; a wider table is unreadable
LISTED = 8


@dataclass(frozen=True)
class ConfusionChange:
    """Images of the class `label` predicted as `answer`, in percent of the label's images."""

    label: str
    answer: str
    before: float
    after: float

    @property
    def points(self) -> str:
        return signed(self.after - self.before, 1)


@dataclass(frozen=True)
class ConfusionComparison:
    """A student against its reference, on the same images of the same seeds.

    `corrected` and `spoiled` count images over the seeds. `matrix` is the student's confusion
    matrix minus the reference's, in percent of each label's images.
    """

    row: SettingRow
    reference: str
    images: int
    seeds: int
    corrected: int
    spoiled: int
    changes: list[ConfusionChange]
    classes: list[str]
    matrix: list[list[float]]


def compare_confusions(rows: list[SettingRow]) -> list[ConfusionComparison]:
    """Each student against the student alone, or without one against its teacher."""
    comparisons = (_compare(row) for row in rows if row.role == "student")
    return [comparison for comparison in comparisons if comparison is not None]


def _compare(row: SettingRow) -> ConfusionComparison | None:
    import numpy as np

    pairs, reference = _with_baseline(row), "the teacher"
    if row.baseline is not None and pairs:
        reference = row.baseline.label
        if reference.startswith("student alone"):
            reference = f"the {reference}"
    else:
        pairs = _with_teacher(row)
    if not pairs:
        return None
    classes = pairs[0][0].classes
    pairs = [pair for pair in pairs if pair[0].classes == classes]  # the data may have changed
    before = after = np.zeros((len(classes), len(classes)))
    corrected = spoiled = 0
    for student, answers in pairs:
        was_right, is_right = answers == student.labels, student.answers == student.labels
        corrected += int((is_right & ~was_right).sum())
        spoiled += int((was_right & ~is_right).sum())
        before = before + _counts(student.labels, answers, len(classes))
        after = after + _counts(student.labels, student.answers, len(classes))
    # The same for both, which have the same labels; 1 avoids 0/0 for a class without images.
    images = np.maximum(after.sum(1, keepdims=True), 1)
    before, after = 100 * before / images, 100 * after / images
    matrix = []
    if len(classes) <= LARGEST_MATRIX:
        matrix = (after - before).round(1).tolist()
    return ConfusionComparison(
        row, reference, len(pairs[0][0].labels), len(pairs), corrected, spoiled,
        _largest(before, after, classes), classes, matrix,
    )  # fmt: skip


def _with_teacher(row: SettingRow) -> list[tuple[StoredPredictions, np.ndarray]]:
    """The seeds that stored their teacher's predictions."""
    stored = [run.predictions for run in row.finished]
    return [(s, s.teacher) for s in stored if s is not None and s.teacher is not None]


def _with_baseline(row: SettingRow) -> list[tuple[StoredPredictions, np.ndarray]]:
    """The seeds that student and student alone have in common, with the same validation images."""
    if row.baseline is None:
        return []
    alone = {run.seed: run.predictions for run in row.baseline.finished}
    pairs = []
    for run in row.finished:
        stored, reference = run.predictions, alone.get(run.seed)
        if stored is not None and reference is not None and stored.same_images(reference):
            pairs.append((stored, reference.answers))
    return pairs


def _counts(labels: np.ndarray, answers: np.ndarray, classes: int) -> np.ndarray:
    """counts[i, j]: the number of images of class i predicted as class j."""
    import numpy as np

    pairs = labels.astype(np.int64) * classes + answers
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes).astype(float)


def _largest(before: np.ndarray, after: np.ndarray, classes: list[str]) -> list[ConfusionChange]:
    """The confusions that changed most, without the diagonal."""
    import numpy as np

    change = np.abs(after - before)
    np.fill_diagonal(change, 0)
    changes = []
    # Stable, so that equal changes keep the order of the classes.
    for place in np.argsort(-change, axis=None, kind="stable")[:LISTED]:
        i, j = divmod(int(place), len(classes))
        if change[i, j] > 0:
            changes.append(
                ConfusionChange(classes[i], classes[j], float(before[i, j]), float(after[i, j]))
            )
    return changes
