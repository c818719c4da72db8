"""The lines that `train` and `distill` print at the end: the files, and the next commands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .run_folder import RunFolder


def next_steps(out: Path, folders: Sequence[RunFolder]) -> list[str]:
    """Lines for finished runs: `out` is the run, or contains a run for each seed."""
    summary = folders[0].summary() or {}
    run, weights = shlex.quote(str(folders[0])), folders[0].student_file
    if len(folders) > 1:
        weights = out / "seed-*" / weights.name
    lines = [
        f"curves, costs and attention maps: {out / 'report.html'}",
        f"weights: {weights}",
    ]
    if summary.get("command") == "train":
        lines.append(f"next: attention-transfer distill --teacher {run} --student MODEL --out OUT")
    else:
        lines.append(
            f"next: attention-transfer predict {run} IMAGE, "
            f"or export {run} --format onnx --out student.onnx"
        )
    return [*_about_teacher(summary), *lines]


def _about_teacher(summary: dict[str, Any]) -> list[str]:
    """A note if the student is better than its teacher."""
    teacher = (summary.get("teacher") or {}).get("val_accuracy")
    student = (summary.get("final") or {}).get("val_accuracy")
    if teacher is None or student is None or student <= teacher:
        return []
    advice = "a stronger teacher may bring more"
    if "kd" in str(summary.get("method")).split("+"):
        # Measured: results/defaults.md, setting weaker-teacher.
        advice = "distillation (kd) then holds it back; try --method at, or a stronger teacher"
    return [
        f"note: the student is better than its teacher ({1 - student:.1%} against "
        f"{1 - teacher:.1%} error): {advice}"
    ]
