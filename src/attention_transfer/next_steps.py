"""The lines that `train` and `distill` print at the end: the files, and the next commands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .run_folder import RunFolder
from .trust import executed_file


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
    # The next command executes the network's Python file only with this flag.
    trust = " --trust-code" if executed_file(str(summary.get("model"))) is not None else ""
    if summary.get("command") == "train":
        config = folders[0].config()
        data = shlex.quote(str(config.get("data")))
        size = config.get("image_size")
        flags = f" --data {data}" + (f" --image-size {size}" if size else "") + trust
        lines.append(
            f"next: attention-transfer distill --teacher {run} --student MODEL{flags} --out OUT"
        )
    else:
        lines.append(
            f"next: attention-transfer predict {run} IMAGE{trust}, "
            f"or export {run} --format onnx --out student.onnx{trust}"
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
