"""A row of the report: the runs of one setting, and their results over the seeds."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from ..stats import Spread
from .formats import MISSING, model_name
from .load_run import LoadedRun, finite_number, get_nested
from .settings import without_seed


@dataclass(eq=False)
class SettingRow:
    """The runs of one setting, one per seed.

    `role` is `teacher`, `alone` (trained without a teacher) or `student` (trained by a method);
    `baseline` is the network alone that this row is compared with. `differences` are the options,
    as text, in which this row differs from rows of the same method; the label contains `named`.
    `is_implied` marks a teacher that was not given but is known from its students.
    """

    runs: list[LoadedRun]
    role: str = "student"
    label: str = ""
    differences: dict[str, str] = field(default_factory=dict)
    named: frozenset[str] = frozenset()
    is_implied: bool = False
    baseline: SettingRow | None = field(default=None, repr=False)
    teacher: SettingRow | None = field(default=None, repr=False)

    @property
    def first(self) -> LoadedRun:
        return self.runs[0]

    @property
    def finished(self) -> list[LoadedRun]:
        return [run for run in self.runs if run.finished]

    @property
    def model(self) -> str:
        return model_name(self.first.model)

    @property
    def method(self) -> str:
        return str(self.first.config.get("method") or "none")

    @property
    def difference_text(self) -> str:
        """`β=100, p=1`: the options of `differences` that the method reads."""
        shown = [f"{name}={text}" for name, text in self.differences.items() if text != MISSING]
        return ", ".join(shown)

    @property
    def error(self) -> Spread | None:
        """Validation error in percent over the finished seeds."""
        return Spread.of(error_percent(run.result("final", "val_accuracy")) for run in self.runs)

    @property
    def top5_error(self) -> Spread | None:
        return Spread.of(error_percent(run.result("final", "val_top5")) for run in self.runs)

    @property
    def fp32_error(self) -> Spread | None:
        """The error of the exported weights, in float32, if a run was trained in bfloat16."""
        accuracies = [run.result("final", "val_accuracy_fp32") for run in self.runs]
        if all(accuracy is None for accuracy in accuracies):
            return None
        for i, run in enumerate(self.runs):
            # A run in float32 measures its weights once, as val_accuracy.
            if get_nested(run.environment, "auto", "precision") == "fp32":
                accuracies[i] = run.result("final", "val_accuracy")
        return Spread.of(map(error_percent, accuracies))

    @property
    def baseline_error(self) -> Spread | None:
        return None if self.baseline is None else self.baseline.error

    @property
    def delta(self) -> float | None:
        """Mean error minus that of the student alone, in points; negative is better."""
        error, baseline_error = self.error, self.baseline_error
        if error is None or baseline_error is None:
            return None
        return error.mean - baseline_error.mean

    def median(self, *keys: str) -> float | None:
        """The median over the seeds of a number in summary.json."""
        spread = Spread.of(run.result(*keys) for run in self.runs)
        return None if spread is None else spread.median

    def times_teacher(self, *keys: str) -> float | None:
        """A number in summary.json divided by the teacher's."""
        student = self.median(*keys)
        # The student's run measures both on one machine; the teacher's run may be from another.
        teacher = self.median("teacher", *keys)
        if teacher is None and self.teacher is not None:
            teacher = self.teacher.median(*keys)
        if not student or not teacher:
            return None
        return student / teacher

    def speed(self, *keys: str) -> float | None:
        """A number of `run.speed`, from the first seed that has one: all have the same network."""
        values = (finite_number(get_nested(run.speed, *keys)) for run in self.runs)
        return next((value for value in values if value is not None), None)

    @property
    def precision(self) -> str:
        """`bf16`, or `bf16, fp32` if the runs differ; empty if it is not known."""
        names = [get_nested(run.environment, "auto", "precision") for run in self.runs]
        return ", ".join(sorted({str(name) for name in names if name}))

    def in_box(self) -> dict[str, float]:
        """The mean share in [0, 1] of the attention inside the object's box, by stage."""
        shares: dict[str, list[float]] = {}
        for run in self.runs:
            stages = get_nested(run.summary, "attention", "stages") or []
            in_box = get_nested(run.summary, "attention", "in_box") or []
            # Not strict: an old summary.json may have stages without shares.
            for stage, share in zip(stages, in_box, strict=False):
                if finite_number(share) is not None:
                    shares.setdefault(str(stage), []).append(share)
        return {stage: statistics.fmean(values) for stage, values in shares.items()}


def error_percent(accuracy: float | None) -> float | None:
    """An accuracy in [0, 1] as an error in percent."""
    return None if accuracy is None else 100 * (1 - accuracy)


def teacher_name(row: SettingRow) -> str | None:
    """The name of the teacher's network; if it is unknown, that of its folder."""
    if row.teacher is not None:
        return row.teacher.model
    for run in row.runs:
        model = get_nested(run.summary, "teacher", "model")
        if model:
            return model_name(str(model))
    teacher = str(row.first.config.get("teacher") or "")
    if Path(teacher).is_absolute() or Path(teacher).is_dir():
        teacher = PurePath(without_seed(teacher)).name
    return model_name(teacher) or None
