"""Runs that differ only in their seed make one row; a row knows its label, its spread and what to compare it with."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from .formats import model_name, setting
from .load_run import Run, dig, number

IGNORED = frozenset(
    [
        "seed",
        "seeds",
        "out",
        "log",
        "device",
        "precision",
        "compile",
        "second_order",
        "workers",
        "devices",
        "nodes",
    ]
)
"""What may differ between the runs of one row."""

SAME_BUDGET = (
    "model",
    "data",
    "epochs",
    "max_steps",
    "limit_train",
    "limit_val",
    "val_split",
    "image_size",
)
"""What a student and the student alone must share for their difference to mean anything."""

SYMBOLS = {
    "model": "",
    "teacher": "from ",
    "data": "on ",
    "beta": "β=",
    "alpha": "α=",
    "temperature": "T=",
}
"""How a setting is written in a label, in the order in which they are named there."""


@dataclass(frozen=True)
class Spread:
    """The values that the seeds of one row gave."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        """The sample standard deviation (n - 1), or None for one value."""
        return statistics.stdev(self.values) if self.n > 1 else None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def overlaps(self, other: Spread) -> bool:
        return self.low <= other.high and other.low <= self.high


@dataclass(eq=False)
class Row:
    """The seeds of one setting. `role`: teacher, alone (a network trained by itself), student (taught by a method)."""

    runs: list[Run]
    role: str = "student"
    label: str = ""
    baseline: Row | None = field(default=None, repr=False)
    teacher: Row | None = field(default=None, repr=False)

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def finished(self) -> list[Run]:
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
        return _spread(_error(run.final("val_accuracy")) for run in self.finished)

    @property
    def top5_error(self) -> Spread | None:
        return _spread(_error(run.final("val_top5")) for run in self.finished)

    @property
    def delta(self) -> float | None:
        """Mean error less that of the student alone, in points; below zero is better."""
        own, other = self.error, self.baseline.error if self.baseline else None
        return own.mean - other.mean if own and other else None

    def value(self, *keys: str) -> float | None:
        """The median over the finished seeds of a number of summary.json."""
        return self.over_seeds(lambda run: number(dig(run.summary, *keys)))

    def over_seeds(self, read: Callable[[Run], float | None]) -> float | None:
        spread = _spread(read(run) for run in self.finished)
        return spread.median if spread else None

    def versus_teacher(self, *keys: str) -> float | None:
        """A number of summary.json over the same number of the teacher, which the same run measured."""
        own, other = self.value(*keys), self.value("teacher", *keys)
        if other is None and self.teacher is not None:
            other = self.teacher.value(*keys)
        return own / other if own and other else None

    def in_box(self) -> list[tuple[str, float]]:
        """(stage, mean share in [0, 1] of the attention inside the object's box) of each stage, where known."""
        found: dict[str, list[float]] = {}
        for run in self.finished:
            attention = dig(run.summary, "attention")
            for stage, share in zip(
                dig(attention, "stages") or [], dig(attention, "in_box") or [], strict=False
            ):
                if number(share) is not None:
                    found.setdefault(str(stage), []).append(float(share))
        return [(stage, statistics.fmean(shares)) for stage, shares in found.items()]


def _error(accuracy: float | None) -> float | None:
    return None if accuracy is None else 100 * (1 - accuracy)


def _spread(values: Iterable[float | None]) -> Spread | None:
    kept = tuple(v for v in values if v is not None)
    return Spread(kept) if kept else None


def group_runs(runs: Iterable[Run]) -> list[Row]:
    """Rows in the order teacher, student alone, the rest as given; a folder named twice counts once."""
    rows: dict[str, Row] = {}
    folders: set[Path] = set()
    for run in runs:
        if run.folder.resolve() in folders:
            continue
        folders.add(run.folder.resolve())
        rows.setdefault(
            json.dumps(_setting_of(run), sort_keys=True, default=str), Row([])
        ).runs.append(run)
    for row in rows.values():
        row.runs.sort(
            key=lambda run: (
                not isinstance(run.seed, int),
                run.seed if isinstance(run.seed, int) else 0,
            )
        )
    ordered = list(rows.values())
    _assign_roles(ordered)
    _assign_labels(ordered)
    for row in ordered:
        row.baseline = _baseline(row, ordered)
        if row.baseline is not None and row.baseline.teacher is None:
            row.baseline.teacher = row.teacher
    rank = {"teacher": 0, "alone": 1, "student": 2}
    return sorted(ordered, key=lambda row: rank[row.role])


def _setting_of(run: Run) -> dict[str, Any]:
    kept = {k: v for k, v in run.config.items() if k not in IGNORED and v is not None}
    if "teacher" in kept:
        kept["teacher"] = _without_seed(str(kept["teacher"]))
    return kept


def _without_seed(path: str) -> str:
    pure = PurePath(path)
    return str(pure.parent) if re.fullmatch(r"seed-\d+", pure.name) else path


def _taught_by(run: Run) -> set[Path]:
    named = (run.config.get("teacher"), dig(run.summary, "teacher", "folder"))
    return {Path(str(name)).resolve() for name in named if name}


def _assign_roles(rows: list[Row]) -> None:
    owner = {run.folder.resolve(): row for row in rows for run in row.runs}
    for row in rows:
        if row.first.command == "train" or row.method == "none":
            row.role = "alone"
    for row in rows:
        for path in (path for run in row.runs for path in _taught_by(run)):
            teacher = owner.get(path)
            if teacher is not None and teacher is not row:
                row.teacher = teacher
                if teacher.first.command == "train":
                    teacher.role = "teacher"


def _method_label(method: str) -> str:
    """`AT+KD`, `symmetry`: abbreviations are written large."""
    return "+".join(name.upper() if name in ("at", "kd") else name for name in method.split("+"))


def _assign_labels(rows: list[Row]) -> None:
    same: dict[str, list[Row]] = {}
    for row in rows:
        if row.first.command == "train":
            row.label = f"{row.model} {row.role}"
        else:
            row.label = "student alone" if row.method == "none" else _method_label(row.method)
        same.setdefault(row.label, []).append(row)
    for twins in same.values():
        if len(twins) > 1:
            _tell_apart(twins)


def _tell_apart(rows: list[Row]) -> None:
    """Appends to each label of `rows` what differs between their configurations, three settings at most."""
    configs = [_setting_of(row.first) for row in rows]
    order = {name: i for i, name in enumerate(SYMBOLS)}
    names = sorted(
        {name for config in configs for name in config}, key=lambda n: (order.get(n, len(order)), n)
    )
    differing = [
        n
        for n in names
        if len({json.dumps(c.get(n), sort_keys=True, default=str) for c in configs}) > 1
    ]
    used: dict[str, int] = {}
    for row, config in zip(rows, configs, strict=True):
        parts = [_difference(row, name, config[name]) for name in differing[:3] if name in config]
        row.label = " ".join([row.label, *parts])
        used[row.label] = used.get(row.label, 0) + 1
        if used[row.label] > 1:
            row.label += f" ({used[row.label]})"


def _difference(row: Row, name: str, value: Any) -> str:
    if name == "model":
        return row.model
    if name == "teacher":
        return f"from {teacher_name(row)}"
    return f"{SYMBOLS.get(name, f'{name}=')}{setting(value)}"


def teacher_name(row: Row) -> str | None:
    """The teacher's network as it is written, or its folder's name, or None."""
    known = row.teacher.first.model if row.teacher else None
    for run in row.runs:
        known = known or dig(run.summary, "teacher", "model")
    named = str(row.first.config.get("teacher") or "")
    if not known and named and not Path(named).is_absolute() and not Path(named).is_dir():
        known = named
    return model_name(str(known)) if known else PurePath(_without_seed(named)).name or None


def _baseline(row: Row, rows: list[Row]) -> Row | None:
    """The student alone that shares the row's network, data and budget; the most alike where there are several."""
    if row.role != "student":
        return None
    own = row.first.config

    def fair(other: Row) -> bool:
        theirs = other.first.config
        return other.role == "alone" and all(
            name not in own or name not in theirs or own[name] == theirs[name]
            for name in SAME_BUDGET
        )

    def alike(other: Row) -> tuple[bool, int]:
        theirs = other.first.config
        return other.first.command == "distill", sum(
            own[k] == theirs[k] for k in own if k in theirs
        )

    return max(filter(fair, rows), key=alike, default=None)
