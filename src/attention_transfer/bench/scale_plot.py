"""The picture of `bench scale`: images/s of a step, and the share of it that transfer adds, along every axis.

`python -m attention_transfer.bench.scale_plot results/bench/scale.json docs/scale.png` draws a table that was kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..run_folder import replacing

OURS, THEIRS = "#1b6ca8", "#b0b0b0"


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Two panels an axis, into a .png or .svg (the name says which)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, PercentFormatter, StrMethodFormatter

    points = [row for row in rows if "axis" in row]
    axes = list(dict.fromkeys(row["axis"] for row in points))
    figure = Figure(figsize=(2.0 * len(axes), 4.2), layout="constrained")
    panels = figure.subplots(2, len(axes), sharey="row", squeeze=False)
    for k, axis in enumerate(axes):
        here = sorted((row for row in points if row["axis"] == axis), key=lambda row: row["value"])
        at = [row["value"] for row in here]
        rates, share = panels[0][k], panels[1][k]
        low, high = ([row[end] for row in here] for end in ("p10", "p90"))
        rates.fill_between(at, low, high, color=OURS, alpha=0.25, linewidth=0)
        rates.plot(
            at, [row["median"] for row in here], "o-", color=OURS, markersize=4, label="AT+KD"
        )
        rates.plot(
            at,
            [row["authors_rate"] for row in here],
            "o-",
            color=THEIRS,
            markersize=4,
            label="the authors'",
        )
        rates.set_yscale("log")
        share.plot(at, [row["share"] for row in here], "o-", color=OURS, markersize=4)
        share.axhline(0, color="black", linewidth=0.6)
        share.set_xlabel(axis)
        share.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        rates.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        for panel in (rates, share):
            panel.set_xticks(at)
            panel.xaxis.set_minor_locator(NullLocator())
            panel.grid(axis="y", linewidth=0.4, alpha=0.5)
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=8)
    panels[0][0].set_ylim(*_limits(points))  # of the whole row
    panels[0][0].set_ylabel("images/s")
    panels[1][0].set_ylabel("share that transfer adds")
    panels[0][0].legend(frameon=False, fontsize=8)
    with replacing(file) as partial:
        figure.savefig(partial, dpi=100, format=file.suffix.removeprefix(".") or "png")


def _limits(points: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The power of ten below every rate, and a little more than the highest."""
    from math import floor, log10

    low = min(min(row["p10"], row["authors_rate"]) for row in points)
    return 10.0 ** floor(log10(low)), 1.3 * max(
        max(row["p90"], row["authors_rate"]) for row in points
    )


if __name__ == "__main__":
    found, picture = map(Path, sys.argv[1:])
    draw(json.loads(found.read_text())["rows"], picture)
