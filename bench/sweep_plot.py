"""Draws a sweep along every axis: images/s of a step, and the share of transfer in its time.

    python bench/sweep_plot.py results/bench/sweep.json docs/scale.png

The name of the picture ends in .png or .svg.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attention_transfer.run_folder import replacing

OURS, AUTHORS = "#1b6ca8", "#b0b0b0"


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Two panels for each axis, into a .png or .svg file."""
    from matplotlib.figure import Figure

    points = [row for row in rows if "axis" in row]
    axes = list(dict.fromkeys(row["axis"] for row in points))
    figure = Figure(figsize=(2.0 * len(axes), 4.2), layout="constrained")
    panels = figure.subplots(2, len(axes), sharey="row", squeeze=False)
    for axis, rates, share in zip(axes, *panels, strict=True):
        chosen = [row for row in points if row["axis"] == axis]
        _draw_axis(sorted(chosen, key=lambda row: row["value"]), rates, share)
        share.set_xlabel(axis)
    panels[0][0].set_ylim(*_limits(points))  # for the whole row, which shares the y axis
    panels[0][0].set_ylabel("images/s")
    panels[1][0].set_ylabel("share that transfer adds")
    panels[0][0].legend(frameon=False, fontsize=8)
    with replacing(file) as partial:
        figure.savefig(partial, dpi=100, format=file.suffix.removeprefix(".") or "png")


def _draw_axis(rows: Sequence[Mapping[str, Any]], rates: Any, share: Any) -> None:
    from matplotlib.ticker import NullLocator, PercentFormatter, StrMethodFormatter

    def column(key: str) -> list[float]:
        return [row[key] for row in rows]

    values = column("value")
    rates.fill_between(values, column("p10"), column("p90"), color=OURS, alpha=0.25, linewidth=0)
    rates.plot(values, column("median"), "o-", color=OURS, markersize=4, label="AT+KD")
    authors = column("authors_rate")
    rates.plot(values, authors, "o-", color=AUTHORS, markersize=4, label="the authors'")
    rates.set_yscale("log")
    rates.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    share.plot(values, column("share"), "o-", color=OURS, markersize=4)
    share.axhline(0, color="black", linewidth=0.6)
    share.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for panel in (rates, share):
        panel.set_xticks(values)
        panel.xaxis.set_minor_locator(NullLocator())
        panel.grid(axis="y", linewidth=0.4, alpha=0.5)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)


def _limits(points: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The power of ten below every rate, and a little more than the highest."""
    low = min(min(row["p10"], row["authors_rate"]) for row in points)
    high = max(max(row["p90"], row["authors_rate"]) for row in points)
    return 10.0 ** math.floor(math.log10(low)), 1.3 * high


if __name__ == "__main__":
    json_file, picture = map(Path, sys.argv[1:])
    draw(json.loads(json_file.read_text())["rows"], picture)
