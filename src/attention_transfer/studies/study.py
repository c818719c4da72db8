"""`study`: carries out a study's plan of runs, and writes a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import UserError, check_choice
from ..report.formats import signed
from ..stats import Estimate, paired_difference, rank_correlation
from .changed import changes_of_study
from .options import STUDIES, StudyOptions
from .plan import make_plan
from .plots import (
    save_bars_figure,
    save_beta_figure,
    save_curves_figure,
    save_scatter_figure,
)
from .publish import publish
from .render import STUDY
from .reproduce import carry_out_plan, check_complete, table_data
from .run_studies import BETAS, DECAYS, TABLES, beta_name
from .summaries import Cell, Line, TableData
from .table_file import TEACHER

COLUMNS = {
    "localisation": ("seeds", "mean", "in box", "pointing"),
    "mechanisms": (*STUDY, "epochs", "minutes"),
    "few-labels": (*STUDY, "epochs", "images"),
    "same-architecture": ("teacher error", *STUDY),
}
# Options that only some studies read.
READ_BY = {
    "methods": ("mechanisms", "same-architecture", "few-labels", "localisation"),
    "values": ("beta", "few-labels", "localisation"),
    "conventions": ("beta",),
    "pairs": ("cost",),
    **dict.fromkeys(("student", "teacher", "recipe", "data"), tuple(TABLES)),
    **dict.fromkeys(("seeds", "jobs"), tuple(TABLES)),
}
MEASURES = {
    "in_box": "attention inside the box, %",
    "pointing": "pointing game, %",
}


def run_study(
    options: StudyOptions, given: Mapping[str, Any], changes: dict[str, Any], console: Console
) -> None:
    """Carries out, or continues, a study; prints its table and writes it with a plot.

    Args:
        given: the options that the user gave.
        changes: recipe keys that override those of the study.

    Raises:
        UserError: for an unknown study, and for options that it does not read.
        RunError: at the end, if runs failed.
    """
    name = options.study
    check_choice("study", name, STUDIES)
    for key in given:
        if name not in READ_BY.get(key, (name,)):
            raise UserError(
                f"--{key} is given, but study {name} does not read it: leave it out "
                f"(studies that read it: {', '.join(READ_BY[key])})"
            )
    if name == "cost":
        from .cost import run_cost

        unused = [key for key in changes if key not in ("device", "batch_size")]
        if unused:
            flag = unused[0].replace("_", "-")
            raise UserError(f"--{flag} is given, but study cost trains nothing: leave it out")
        run_cost(options, changes, console)
        return
    changed = changes_of_study(options, given, changes)
    table = TABLES[name](options, changes)
    plan = make_plan(table, table.rows, options.seeds, options.out, {}, changes)
    if not carry_out_plan(plan, options, console):
        return
    data = table_data(plan, changed)
    data.head["notes"] = [*study_notes(name, data), *data.head.get("notes", [])]
    stem = options.out / changed.stem(f"study-{name}")
    columns = COLUMNS.get(name, STUDY)
    publish(data, columns, stem, console, options.json)
    picture = stem.with_name(f"{stem.name}.png")
    draw(name, data, picture)
    console.out(f"plot: {picture}")
    check_complete(plan)


def draw(name: str, data: TableData, file: Path) -> None:
    """The plot of a study."""
    if name == "beta":
        save_beta_figure(data, beta_curves(data), file)
    elif name == "few-labels":
        save_curves_figure(share_curves(data), "labels, % of the training set", file)
    elif name == "localisation":
        save_scatter_figure(runs_by_method(data), MEASURES, file)
    else:
        save_bars_figure(data, file)


def beta_curves(data: TableData) -> dict[str, dict[str, dict[float, Cell]]]:
    """The cells of study `beta` by convention, decay and β."""
    curves: dict[str, dict[str, dict[float, Cell]]] = {}
    for cell in data.cells:
        convention, _, rest = cell.setting.partition(", ")
        decay, _, beta = rest.partition(", β = ")
        if convention in BETAS and decay in DECAYS:
            assert cell.setting == beta_name(convention, decay, float(beta))
            curves.setdefault(convention, {}).setdefault(decay, {})[float(beta)] = cell
    return curves


def share_curves(data: TableData) -> dict[str, dict[float, Cell]]:
    """The cells of study `few-labels` by method and share."""
    curves: dict[str, dict[float, Cell]] = {}
    for cell in data.cells:
        if cell.setting != TEACHER:
            share = float(cell.row.partition(" %")[0])
            curves.setdefault(cell.setting, {})[share] = cell
    return curves


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
        notes.append("Fewer labels get more epochs, by the root of the factor.")
    if name == "localisation":
        notes += localisation_notes(data)
    return notes


def localisation_notes(data: TableData) -> list[str]:
    """Rank correlations of accuracy with attention in the box, and the change by AT."""
    groups = runs_by_method(data)
    every_run = [run for runs in groups.values() for run in runs]
    by_length: dict[str, list[Line]] = {}
    for run in (run for name, runs in groups.items() if name != TEACHER for run in runs):
        by_length.setdefault(f"after {run['epochs']} epochs", []).append(run)
    notes = [
        "Networks of one method or one length are not independent of each other, so the intervals "
        "of the correlations are too narrow."
    ]
    for key, label in MEASURES.items():
        for name, runs in {"all networks": every_run, **groups, **by_length}.items():
            accuracy = [100 - run["error"] for run in runs]
            estimate = rank_correlation(accuracy, [run[key] for run in runs])
            if estimate is not None:
                text = f"Rank correlation of accuracy and {label.removesuffix(', %')}, {name}: "
                notes.append(text + described(estimate, ".2f"))
    alone = {c.setting.partition(", ")[2]: c for c in data.cells if c.setting.startswith("student")}
    for cell in data.cells:
        method, _, length = cell.setting.partition(", ")
        if length in alone and cell is not alone[length]:
            estimate = paired_difference(cell.values("in_box"), alone[length].values("in_box"))
            if estimate is not None:
                text = f"{method} after {length}, attention inside the box against alone: "
                notes.append(f"{text}{signed(estimate.value, 1)} points{_interval(estimate)}")
    return notes


def described(estimate: Estimate, form: str) -> str:
    return f"{estimate.value:{form}}{_interval(estimate)}, p = {estimate.p:.2g}, n = {estimate.n}"


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" ({signed(estimate.low, 2)} to {signed(estimate.high, 2)})"
