"""Groups runs into settings: runs that differ only in their seed make one row of the report."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .labels import assign_labels
from .load_run import LoadedRun, get_nested
from .rows import SettingRow
from .settings import as_key, setting

# A student and its baseline must share these options for their difference to mean anything.
BUDGET_OPTIONS = (
    "model", "data", "epochs", "max_steps", "limit_train", "limit_val", "val_split", "image_size",
)  # fmt: skip


def group_runs(runs: Iterable[LoadedRun]) -> list[SettingRow]:
    """One row per setting: teachers, then students alone, then the rest in the order given.

    A folder that is given twice counts once.
    """
    by_folder = {run.folder.resolve(): run for run in runs}
    by_setting: dict[str, SettingRow] = {}
    for run in by_folder.values():
        by_setting.setdefault(as_key(setting(run)), SettingRow([])).runs.append(run)
    rows = list(by_setting.values())
    for row in rows:
        # Sorted as text with leading zeros: seed 10 follows seed 2, and a run without seed is last.
        row.runs.sort(key=lambda run: str(run.seed).zfill(20))
    _assign_roles(rows)
    assign_labels(rows)
    assign_baselines(rows)
    order = ["teacher", "alone", "student"]
    return sorted(rows, key=lambda row: order.index(row.role))


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
            # A distilled student that is another student's teacher keeps the role of a student.
            if teacher.first.command == "train":
                teacher.role = "teacher"


def _teacher_folders(row: SettingRow) -> list[Path]:
    """The folders that the row's runs name as their teachers."""
    names = [run.config.get("teacher") for run in row.runs]
    names += [get_nested(run.summary, "teacher", "folder") for run in row.runs]
    return [Path(str(name)).resolve() for name in names if name]


def assign_baselines(rows: list[SettingRow]) -> None:
    """Sets the row that each student is compared with."""
    for row in rows:
        row.baseline = _find_baseline(row, rows)
        # The costs of the student alone are compared with the costs of the same teacher.
        if row.baseline not in (None, row.teacher) and row.baseline.teacher is None:
            row.baseline.teacher = row.teacher


def _find_baseline(row: SettingRow, rows: list[SettingRow]) -> SettingRow | None:
    """The most similar network alone that has the network, data and budget of `row`.

    A teacher with the same network and budget also counts as a network alone.
    """
    if row.role != "student":
        return None
    best, most_equal = None, (False, False, -1)
    for other in rows:
        # Ignore an option that only one of two run folders has: the other one may be older.
        shared = row.first.config.keys() & other.first.config.keys()
        equal = [name for name in shared if row.first.config[name] == other.first.config[name]]
        is_alone = other.role == "alone" or other.first.command == "train"
        # The budget of a teacher that is not among the runs is not known.
        if other.is_implied and "epochs" not in shared:
            continue
        if not is_alone or shared.intersection(BUDGET_OPTIONS).difference(equal):
            continue
        # `distill --method none` has the recipe of a student, `train` may have another.
        similarity = (other.role == "alone", other.first.command == "distill", len(equal))
        if similarity > most_equal:
            best, most_equal = other, similarity
    return best
