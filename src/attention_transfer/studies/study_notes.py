"""The notes of a study for the readers of its table."""

from __future__ import annotations

import statistics

from ..errors import plural
from ..report.formats import MINUS, signed
from ..stats import Estimate, paired_difference, rank_correlation
from .summaries import Line, TableData
from .table_file import TEACHER

MEASURES = {
    "in_box": "attention inside the box, %",
    "pointing": "pointing game, %",
}


def runs_by_method(data: TableData) -> dict[str, list[Line]]:
    """The runs with boxes of study `localisation`, by method."""
    groups: dict[str, list[Line]] = {}
    for cell in data.cells:
        runs = [run for run in cell.runs if all(key in run for key in MEASURES)]
        groups.setdefault(cell.setting.partition(",")[0], []).extend(runs)
    return {name: runs for name, runs in groups.items() if runs}


def study_notes(name: str, data: TableData) -> list[str]:
    """Notes on the table for its readers."""
    notes = ["95 % intervals: bootstrap for a mean, paired t-test for a difference."]
    if name == "mechanisms":
        notes.append("Each setting has as many epochs as the FLOPs of AT allow.")
    if name == "few-labels":
        notes.append(
            "Fewer labels get more epochs, by the square root: 1 % of them, 10 times the epochs."
        )
    if name == "localisation":
        notes += localisation_notes(data)
    return notes


def localisation_notes(data: TableData) -> list[str]:
    """Rank correlations of accuracy with attention in the box, and the change by AT."""
    groups = runs_by_method(data)
    every_run = [run for runs in groups.values() for run in runs]
    by_length: dict[str, list[Line]] = {}
    for run in (run for name, runs in groups.items() if name != TEACHER for run in runs):
        by_length.setdefault(f"after {plural(run['epochs'], 'epoch')}", []).append(run)
    notes = [
        "Networks of one method or one length are not independent of each other, so the intervals "
        "of the correlations are too narrow."
    ]
    chance = {"in the box": "box_area", "in the pointing game": "random_pointing"}
    for place, key in chance.items():
        values = [run[key] for run in every_run if run.get(key) is not None]
        if values:
            notes.append(f"Chance {place}: {statistics.mean(values):.1f} %.")
    for key, label in MEASURES.items():
        for name, runs in {"all networks": every_run, **groups, **by_length}.items():
            accuracy = [100 - run["error"] for run in runs]
            estimate = rank_correlation(accuracy, [run[key] for run in runs])
            if estimate is not None:
                text = f"Rank correlation of accuracy and {label.removesuffix(', %')}, {name}: "
                notes.append(text + estimate_text(estimate))
    alone = {c.setting.partition(", ")[2]: c for c in data.cells if c.setting.startswith("student")}
    for cell in data.cells:
        method, _, length = cell.setting.partition(", ")
        if length in alone and cell is not alone[length]:
            estimate = paired_difference(cell.values("in_box"), alone[length].values("in_box"))
            if estimate is not None:
                text = f"{method} after {length}, attention inside the box against alone: "
                notes.append(f"{text}{signed(estimate.value, 1)} points{_interval(estimate)}")
    return notes


def estimate_text(estimate: Estimate) -> str:
    value = f"{estimate.value:.2f}".replace("-", MINUS)
    return f"{value}{_interval(estimate)}, p = {estimate.p:.2g}, n = {estimate.n}"


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" ({signed(estimate.low, 2)} to {signed(estimate.high, 2)})"
