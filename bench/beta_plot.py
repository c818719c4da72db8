"""Draws sweeps of β and `auto`: the difference in error from the student alone, in points.

    python bench/beta_plot.py docs/beta.png

The summaries of the runs are in results/defaults/. Below zero, transfer helped the student.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from table_files import read_table_data

from attention_transfer.studies.plots import COLOURS, figure, scale_by_logarithm
from attention_transfer.studies.summaries import Cell, TableData

RESULTS = Path(__file__).parents[1] / "results" / "defaults"
SWEEP = re.compile(r"(?P<convention>authors|caffe), β = (?P<beta>\d+)")
EIGHTH = "#8c6d31"  # a colour that COLOURS lacks
TITLES = {"authors": "convention authors", "caffe": "convention caffe (per unit of energy)"}


def difference(cell: Cell, alone: Cell) -> float | None:
    """The mean difference of the errors over the common seeds, in points."""
    errors, baseline = cell.values("error"), alone.values("error")
    seeds = errors.keys() & baseline.keys()
    if not seeds:
        return None
    return statistics.fmean(errors[seed] - baseline[seed] for seed in seeds)


def curves(table: TableData) -> tuple[dict[str, dict[float, float]], float | None]:
    """Differences by convention and β, and that of `auto`."""
    cells = {cell.setting: cell for cell in table.cells}
    alone = cells["student alone"]
    swept: dict[str, dict[float, float]] = {convention: {} for convention in TITLES}
    for name, cell in cells.items():
        match, points = SWEEP.fullmatch(name), difference(cell, alone)
        if match and points is not None:
            swept[match["convention"]][float(match["beta"])] = points
    return swept, difference(cells["auto"], alone) if "auto" in cells else None


def draw(tables: Sequence[TableData], file: Path) -> None:
    """A panel for each convention, a line for each setting, its `auto` as a level."""
    with figure(file, len(TITLES), width=4.4) as panels:
        for axes, convention in zip(panels, TITLES, strict=True):
            for colour, table in zip(cycle((*COLOURS, EIGHTH)), tables, strict=False):
                _draw_setting(axes, convention, table, colour)
            axes.axhline(0, color="#555555", lw=1)
            scale_by_logarithm(axes)
            axes.set_title(TITLES[convention])
            axes.set_xlabel("β")
        panels[0].set_ylabel("error against alone, points")
        panels[-1].legend(frameon=False, fontsize=8)


def _draw_setting(axes: Any, convention: str, table: TableData, colour: str) -> None:
    swept, auto = curves(table)
    points = sorted(swept[convention].items())
    axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=table.title)
    if auto is not None:
        axes.axhline(auto, color=colour, ls=":", lw=1.2)


def main() -> None:
    tables = [read_table_data(file) for file in sorted(RESULTS.glob("*.jsonl"))]
    swept = [table for table in tables if all(curves(table)[0].values())]
    draw(swept, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
