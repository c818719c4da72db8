"""Interleaved timing of several things, and the table and JSON that come of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Timed = Callable[[], float]


@dataclass
class Row:
    """One thing's images/s over the rounds, and its ratio to the authors' in the same round."""

    name: str
    rates: list[float]
    ratios: list[float]
    more: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        low, high = _percentile(self.rates, 0.1), _percentile(self.rates, 0.9)
        return {
            "name": self.name,
            "median": statistics.median(self.rates),
            "p10": low,
            "p90": high,
            "times_authors": statistics.median(self.ratios),
            **self.more,
        }


def interleave(timed: dict[str, Timed], rounds: int) -> list[Row]:
    """Times each in turn, round after round, so that a machine whose speed drifts drifts for all alike.

    Each of `timed` runs once and returns images/s; `authors` is among them.
    """
    rates: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, run in timed.items():
            rates[name].append(run())
    return [Row(n, r, [a / b for a, b in zip(r, rates["authors"], strict=True)]) for n, r in rates.items()]


def report(bench: str, rows: list[Row], about: dict[str, Any], console: Console, file: Path | None) -> None:
    """Prints the table; writes `{"bench", "hardware", "rows"}` where a file is named."""
    from ..runs import write_json

    table = Table(title=f"bench {bench}", title_justify="left")
    more = list(rows[0].more)
    for heading in ("", "images/s", "p10", "p90", "× authors", *(name.replace("_", " ") for name in more)):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        d = row.to_dict()
        numbers = [f"{d[k]:,.0f}" for k in ("median", "p10", "p90")]
        table.add_row(d["name"], *numbers, *(f"{d[k]:.2f}" for k in ("times_authors", *more)))
    console.print(table)
    if file is not None:
        found = {"bench": bench, "date": date.today().isoformat(), **about, "rows": [r.to_dict() for r in rows]}
        write_json(file, found)
        console.print(f"written: {file}", markup=False, highlight=False, soft_wrap=True)


def _percentile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[round(q * (len(ordered) - 1))]
