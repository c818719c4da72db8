"""`study`: carries out a study's plan of runs, and writes a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import UserError, check_choice
from .changed import changes_of_study
from .options import STUDIES, StudyOptions
from .plan import make_plan
from .plots import (
    save_bars_figure,
    save_beta_figure,
    save_curves_figure,
    save_scatter_figure,
)
from .publish import check_table_files, publish, table_files
from .render import STUDY
from .reproduce import carry_out_plan, check_complete
from .results import table_data
from .run_studies import BETAS, DECAYS, TABLES, beta_name
from .study_notes import MEASURES, runs_by_method, study_notes
from .summaries import Cell, TableData
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
    **dict.fromkeys(("student", "teacher", "recipe", "data", "seeds", "jobs"), tuple(TABLES)),
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
    changed = changes_of_study(options, given, changes)
    stem = options.out / changed.stem(f"study-{name}")
    if name == "cost":
        from .cost import run_cost

        unused = [key for key in changes if key not in ("device", "batch_size", "trust_code")]
        if unused:
            flag = unused[0].replace("_", "-")
            raise UserError(f"--{flag} is given, but study cost trains nothing: leave it out")
        run_cost(options, changes, stem, console)
        return
    table = TABLES[name](options, changes)
    plan = make_plan(table, table.rows, options.seeds, options.out, {}, changes)
    check_table_files(table_files(stem), options.force)
    if not carry_out_plan(plan, options, console):
        return
    data = table_data(plan, changed)
    data.head["notes"] = [*study_notes(name, data), *data.head.get("notes", [])]
    columns = COLUMNS.get(name, STUDY)
    publish(data, columns, stem, console, options.json)
    *_, picture = table_files(stem)
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
