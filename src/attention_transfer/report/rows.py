"""Groups runs into settings: runs that differ only in their seed make one row of the report."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from .formats import model_name, option_value
from .load_run import LoadedRun, finite_number, get_nested

# Options that may differ between the runs of one row: seeds, paths and the machine. Some of them
# exist in old run folders only.
PER_RUN_OPTIONS = (
    "seed", "seeds", "out", "log", "device", "precision", "compile", "second_order", "workers",
    "devices", "nodes",
)  # fmt: skip

# A student and its baseline must share these options for their difference to mean anything.
BUDGET_OPTIONS = (
    "model", "data", "epochs", "max_steps", "limit_train", "limit_val", "val_split", "image_size",
)  # fmt: skip

ABBREVIATIONS = {"at": "AT", "kd": "KD"}

# How labels write an option, in the order in which labels name options.
LABEL_PREFIXES = {
    "model": "", "teacher": "from ", "data": "on ",
    "beta": "β=", "alpha": "α=", "temperature": "T=",
}  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """The results of the seeds of one setting; `sd` is None for a single seed."""

    values: tuple[float, ...]
    mean: float
    sd: float | None  # sample standard deviation, n - 1
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, results: Iterable[float | None]) -> Spread | None:
        """The spread of the results that are known, or None if none is."""
        values = tuple(value for value in results if value is not None)
        if not values:
            return None
        mean, median = statistics.fmean(values), statistics.median(values)
        sd = statistics.stdev(values) if len(values) > 1 else None
        return cls(values, mean, sd, median, min(values), max(values))

    @property
    def n(self) -> int:
        return len(self.values)

    def overlaps(self, other: Spread) -> bool:
        return self.low <= other.high and other.low <= self.high


@dataclass(eq=False)
class SettingRow:
    """The runs of one setting, one per seed.

    `role` is `teacher`, `alone` (trained without a teacher) or `student` (trained by a method);
    `baseline` is the student alone that this row is compared with.
    """

    runs: list[LoadedRun]
    role: str = "student"
    label: str = ""
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
    def error(self) -> Spread | None:
        """Validation error in percent over the finished seeds."""
        return Spread.of(error_percent(run.result("final", "val_accuracy")) for run in self.runs)

    @property
    def top5_error(self) -> Spread | None:
        return Spread.of(error_percent(run.result("final", "val_top5")) for run in self.runs)

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
        # The same run measures both on the same machine; the teacher's own run may be from another.
        teacher = self.median("teacher", *keys)
        if teacher is None and self.teacher is not None:
            teacher = self.teacher.median(*keys)
        if not student or not teacher:
            return None
        return student / teacher

    def in_box(self) -> dict[str, float]:
        """The mean share in [0, 1] of the attention inside the object's box, by stage."""
        shares: dict[str, list[float]] = {}
        for run in self.runs:
            stages = get_nested(run.summary, "attention", "stages") or []
            in_box = get_nested(run.summary, "attention", "in_box") or []
            # Not strict: an old summary.json may name stages without their shares.
            for stage, share in zip(stages, in_box, strict=False):
                if finite_number(share) is not None:
                    shares.setdefault(str(stage), []).append(share)
        return {stage: statistics.fmean(values) for stage, values in shares.items()}


def error_percent(accuracy: float | None) -> float | None:
    """An accuracy in [0, 1] as an error in percent."""
    return None if accuracy is None else 100 * (1 - accuracy)


def group_runs(runs: Iterable[LoadedRun]) -> list[SettingRow]:
    """One row per setting: teachers, then students alone, then the rest in the order given.

    A folder that is given twice counts once.
    """
    by_folder = {run.folder.resolve(): run for run in runs}
    by_setting: dict[str, SettingRow] = {}
    for run in by_folder.values():
        by_setting.setdefault(_as_key(_setting(run)), SettingRow([])).runs.append(run)
    rows = list(by_setting.values())
    for row in rows:
        # As text with zeros in front, seed 10 follows seed 2, and a run without a seed is last.
        row.runs.sort(key=lambda run: str(run.seed).zfill(20))
    _assign_roles(rows)
    _assign_labels(rows)
    for row in rows:
        row.baseline = _find_baseline(row, rows)
        # The cost of the student alone is compared with the same teacher's.
        if row.baseline is not None and row.baseline.teacher is None:
            row.baseline.teacher = row.teacher
    order = ["teacher", "alone", "student"]
    return sorted(rows, key=lambda row: order.index(row.role))


def _setting(run: LoadedRun) -> dict[str, Any]:
    """The options that make a run's setting."""
    options = {name: value for name, value in run.config.items() if name not in PER_RUN_OPTIONS}
    if options.get("teacher"):
        # Each seed may have a teacher of its own seed.
        options["teacher"] = _without_seed(str(options["teacher"]))
    # An old run folder may leave out an option that a newer one sets to null.
    return {name: value for name, value in options.items() if value is not None}


def _as_key(value: Any) -> str:
    """Equal text for equal options, which may be lists or dictionaries."""
    return json.dumps(value, sort_keys=True, default=str)


def _without_seed(path: str) -> str:
    """`runs/teacher/seed-1` -> `runs/teacher`."""
    if re.fullmatch(r"seed-\d+", PurePath(path).name):
        return str(PurePath(path).parent)
    return path


def _assign_roles(rows: list[SettingRow]) -> None:
    """Sets each row's role and, if it is among the rows, its teacher."""
    row_of = {}
    for row in rows:
        if row.first.command == "train" or row.method == "none":
            row.role = "alone"
        row_of.update({run.folder.resolve(): row for run in row.runs})
    for row in rows:
        for folder in _teacher_folders(row):
            teacher = row_of.get(folder)
            if teacher is None or teacher is row:
                continue
            row.teacher = teacher
            # A distilled student that teaches another one stays a student.
            if teacher.first.command == "train":
                teacher.role = "teacher"


def _teacher_folders(row: SettingRow) -> list[Path]:
    """The folders that the row's runs name as their teachers."""
    names = [run.config.get("teacher") for run in row.runs]
    names += [get_nested(run.summary, "teacher", "folder") for run in row.runs]
    return [Path(str(name)).resolve() for name in names if name]


def _assign_labels(rows: list[SettingRow]) -> None:
    by_label: dict[str, list[SettingRow]] = {}
    for row in rows:
        if row.first.command == "train":
            row.label = f"{row.model} {row.role}"
        elif row.method == "none":
            row.label = "student alone"
        else:
            names = row.method.split("+")
            row.label = "+".join(ABBREVIATIONS.get(name, name) for name in names)
        by_label.setdefault(row.label, []).append(row)
    for namesakes in by_label.values():
        if len(namesakes) > 1:
            _append_differences(namesakes)


def _append_differences(rows: list[SettingRow]) -> None:
    """Appends up to three of the options that differ between `rows` to their labels."""
    settings = [_setting(row.first) for row in rows]
    names = set().union(*settings)
    differing = []
    for name in [*LABEL_PREFIXES, *sorted(names - LABEL_PREFIXES.keys())]:
        if len({_as_key(setting.get(name)) for setting in settings}) > 1:
            differing.append(name)
    uses: dict[str, int] = {}
    for row, setting in zip(rows, settings, strict=True):
        for name in differing[:3]:
            if name in setting:
                row.label += " " + _option_label(row, name, setting[name])
        # The rows may differ in a fourth option only.
        uses[row.label] = uses.get(row.label, 0) + 1
        if uses[row.label] > 1:
            row.label += f" ({uses[row.label]})"


def _option_label(row: SettingRow, name: str, value: Any) -> str:
    """`β=100`, `WRN-16-1`, `from WRN-16-2`, `lr=0.2`."""
    text = option_value(value)
    if name == "model":
        text = row.model
    elif name == "teacher":
        text = str(teacher_name(row))
    return LABEL_PREFIXES.get(name, f"{name}=") + text


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
        teacher = PurePath(_without_seed(teacher)).name
    return model_name(teacher) or None


def _find_baseline(row: SettingRow, rows: list[SettingRow]) -> SettingRow | None:
    """The most similar student alone that has the network, data and budget of `row`."""
    if row.role != "student":
        return None
    best, most_equal = None, (False, -1)
    for other in rows:
        # An option that only one of two run folders has is no difference: one may be older.
        shared = row.first.config.keys() & other.first.config.keys()
        equal = [name for name in shared if row.first.config[name] == other.first.config[name]]
        if other.role != "alone" or shared.intersection(BUDGET_OPTIONS).difference(equal):
            continue
        # `distill --method none` shares the recipe of a student, `train` may not.
        similarity = (other.first.command == "distill", len(equal))
        if similarity > most_equal:
            best, most_equal = other, similarity
    return best
