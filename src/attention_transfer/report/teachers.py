"""Rows for teachers that are not among the runs, from the measurements of their students."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..authors_log import MODEL_FILE, is_authors_run
from ..errors import UserError
from ..run_folder import RunFolder
from .grouping import assign_baselines
from .load_run import LoadedRun, finite_number, get_nested
from .open_run import read_run
from .rows import SettingRow

MEASURED = ("parameters", "flops", "inference", "attention")


def with_teachers(rows: Sequence[SettingRow]) -> list[SettingRow]:
    """The rows, preceded by a row for each teacher that is not among them.

    Its error, costs and maps come from a student's run; its curve comes from its own folder, if it
    has one.
    """
    rows = list(rows)
    implied: dict[str, SettingRow] = {}
    for row in rows:
        if row.teacher in rows or row.role == "teacher":
            continue
        for run in row.finished:
            facts = get_nested(run.summary, "teacher")
            if finite_number(get_nested(facts, "val_accuracy")) is None:
                continue
            key = str(facts.get("folder") or run.config.get("teacher") or facts.get("name"))
            if key not in implied:
                implied[key] = _row(run, facts, key)
            row.teacher = implied[key]
            break
    labels = {row.label for row in rows}
    for key, teacher in implied.items():
        if teacher.label in labels:
            teacher.label += f" ({key})"
        labels.add(teacher.label)
    rows = [*implied.values(), *rows]
    assign_baselines(rows)
    return rows


def _row(student: LoadedRun, facts: dict[str, Any], folder: str) -> SettingRow:
    name = str(facts.get("model") or facts.get("name") or "the")
    run = LoadedRun(Path(folder), {"command": "train", "data": student.config.get("data")})
    own = _own_run(student, facts)
    if own is not None:
        run.config, run.metrics = own.config | {"command": own.command}, own.metrics
    run.config = run.config | {"model": name}
    run.summary = {key: facts.get(key) for key in MEASURED}
    run.summary["final"] = {"val_accuracy": facts["val_accuracy"]}
    row = SettingRow([run], role="teacher", is_implied=True)
    row.label = f"{row.model} teacher"
    if facts.get("store"):
        row.label += " (store)"
    return row


def _own_run(student: LoadedRun, facts: dict[str, Any]) -> LoadedRun | None:
    """The teacher's own run; None if it is missing or damaged, or has other weights now."""
    if not facts.get("folder"):
        return None
    folder = RunFolder(facts["folder"])
    fingerprint = student.environment.get("teacher")
    file = folder.student_file if folder.exists else folder.path / MODEL_FILE
    try:
        if not folder.exists and not is_authors_run(folder.path):
            return None
        if fingerprint and hashlib.sha256(file.read_bytes()).hexdigest() != fingerprint:
            return None
        return read_run(folder)
    except (OSError, UserError):
        return None
