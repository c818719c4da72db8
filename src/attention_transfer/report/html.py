"""The page: one file with everything in it, to be opened from disk."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..run_folder import replacing
from . import summary_text
from .curves import curve_figures, spread_figure, styles
from .formats import data_name, seeds, setting
from .load_run import Run
from .overlays import grid
from .rows import IGNORED, Row, group_runs
from .table import columns, subtitle


def write_report(runs: list[Run], out: Path, title: str | None = None) -> None:
    """Writes the runs' results, curves, maps and settings as one HTML file that needs no network.

    Raises:
        UserError: without a run, or where `out` is a folder.
    """
    if not runs:
        raise UserError("no runs to report on: name at least one run folder")
    if Path(out).is_dir():
        raise UserError(f"{out} is a folder: name the HTML file to write")
    text = _render(group_runs(runs), title)
    with replacing(Path(out)) as partial:
        partial.write_text(text, encoding="utf-8")


def _render(rows: list[Row], title: str | None) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    look = styles(rows)
    found = columns(rows)
    spread = spread_figure(rows, look)
    return pages.get_template("template.html.j2").render(
        title=title or summary_text.title(rows),
        facts=facts(rows, named=title is None),
        rows=rows,
        look=look,
        note=_note(rows),
        subtitle=subtitle,
        results=[c for c in found if not c.cost],
        costs=[c for c in found if c.cost],
        sentences=[line.partition(": ")[::2] for line in summary_text.sentences(rows)],
        caveats=summary_text.caveats(rows),
        spread=spread,
        curves=curve_figures(rows, look),
        grid=grid(rows),
        in_box=in_box_table(rows),
        settings=[setting_details(row) for row in rows],
        environments=environments(rows),
        svg=Markup,
    )


def _note(rows: list[Row]) -> str:
    """What the columns of the results mean, as far as they are there."""
    several = any(row.error and row.error.n > 1 for row in rows)
    lines = [
        "Error: mean over the seeds ± sample standard deviation."
        if several
        else "Error: on the validation images."
    ]
    if any(row.delta is not None for row in rows):
        lines.append("Δ alone: points of error against the student alone; below zero is better.")
    if any(row.in_box() for row in rows):
        lines.append("In box: share of the last stage's attention inside the object's box.")
    return " ".join(lines)


def facts(rows: list[Row], named: bool = False) -> list[str]:
    """The line under the title: data (unless the title has `named` them), settings, runs, epochs."""
    runs = [run for row in rows for run in row.runs]
    data = dict.fromkeys(data_name(r.config["data"]) for r in runs if r.config.get("data"))
    found = [] if named else list(data)
    found.append("1 setting" if len(rows) == 1 else f"{len(rows)} settings")
    unfinished = sum(not run.finished for run in runs)
    found.append(
        ("1 run" if len(runs) == 1 else f"{len(runs)} runs")
        + (f", {unfinished} unfinished" if unfinished else "")
    )
    epochs = {run.config["epochs"] for run in runs if run.config.get("epochs") is not None}
    if len(epochs) == 1:
        found.append(f"{setting(epochs.pop())} epochs")
    return found


def in_box_table(rows: list[Row]) -> dict[str, Any] | None:
    """Stages and, for each row, their shares in percent; None where no run measured them."""
    known = [(row, dict(row.in_box())) for row in rows if row.in_box()]
    if not known:
        return None
    stages = list(dict.fromkeys(stage for _, shares in known for stage in shares))
    lines = [
        (
            row,
            [f"{100 * s[t]:.1f}" if t in s else "–" for t in stages],
            row.value("attention", "box_area"),
        )
        for row, s in known
    ]
    return {
        "stages": stages,
        "lines": [(row, cells, f"{100 * c:.1f}" if c else "–") for row, cells, c in lines],
    }


def setting_details(row: Row) -> dict[str, Any]:
    """The effective configuration of a row, what its seeds share first, and where its runs lie."""
    shared = [(k, setting(v)) for k, v in row.first.config.items() if k not in IGNORED]
    differing = [(k, setting(v)) for k, v in row.first.config.items() if k in IGNORED]
    runs = [
        {
            "folder": str(run.folder),
            "seed": setting(run.seed),
            "state": "finished" if run.finished else "unfinished",
        }
        for run in row.runs
    ]
    return {
        "row": row,
        "shared": shared,
        "differing": differing,
        "runs": runs,
        "count": seeds(len(row.runs)),
    }


def environments(rows: list[Row]) -> list[dict[str, Any]]:
    """Machines and versions, each once, with the labels of the rows that ran there; the commands beside them."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        for run in row.runs:
            if not run.environment:
                continue
            pairs = _pairs(
                {k: v for k, v in run.environment.items() if k not in ("command", "argv")}
            )
            place = found.setdefault(repr(pairs), {"pairs": pairs, "rows": [], "commands": []})
            if row.label not in place["rows"]:
                place["rows"].append(row.label)
                if command := _command(run.environment.get("command")):
                    place["commands"].append((row.label, command))
    return list(found.values())


def _command(value: Any) -> str:
    if isinstance(value, list | tuple):
        return shlex.join(str(v) for v in value)
    return str(value or "")


def _pairs(tree: dict[str, Any], before: str = "") -> list[tuple[str, str]]:
    """A nested dictionary as (`outer inner`, text) pairs."""
    found = []
    for key, value in tree.items():
        name = f"{before}{key}"
        if isinstance(value, dict) and value:
            found += _pairs(value, f"{name} ")
        elif value is not None:
            found.append((name, setting(value)))
    return found
