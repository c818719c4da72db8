"""The numbers of a comparison as `--json` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .load_run import LoadedRun
from .rows import SettingRow, teacher_name
from .summary_text import caveats, sentences
from .table import COSTS, SPEEDS
from .teachers import with_teachers


def comparison_numbers(rows: Sequence[SettingRow]) -> dict[str, Any]:
    """The rows of the table, unrounded; errors in percent, None if unknown."""
    shown = with_teachers(rows)
    return {
        "rows": [_row_numbers(row) for row in shown],
        "sentences": [*sentences(shown), *caveats(shown)],
    }


def _row_numbers(row: SettingRow) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "setting": row.label,
        "role": row.role,
        "network": row.model,
        "method": row.method,
        "teacher": teacher_name(row) if row.role == "student" else None,
        "options": row.differences,
        "runs": [] if row.is_implied else [_run_numbers(run) for run in row.runs],
    }
    for name in ("error", "fp32_error", "top5_error"):
        spread = getattr(row, name)
        numbers[name] = None if spread is None else asdict(spread)
    numbers["error_minus_alone"] = row.delta
    numbers["in_box"] = row.in_box()
    for keys, _, _ in COSTS.values():
        numbers["_".join(keys)] = row.median(*keys)
    for key, _ in SPEEDS.values():
        measured = {name: row.speed(key, name) for name in ("median", "low", "high")}
        numbers[f"inference_{key}"] = measured if measured["median"] is not None else None
    numbers["inference_peak_mib"] = row.speed("peak_mib")
    return numbers


def _run_numbers(run: LoadedRun) -> dict[str, Any]:
    return {"folder": str(run.folder), "seed": run.seed, "finished": run.finished}
