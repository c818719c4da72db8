"""Interleaved timing of several things, and the table and JSON that come of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
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


def interleave(
    timed: dict[str, Timed], rounds: int, against: Mapping[str, str] | None = None
) -> list[Row]:
    """Times each in turn, round after round, so that a machine whose speed drifts drifts for all alike.

    Each of `timed` runs once and returns images/s. The ratios are to `authors`, which is among them, or to what
    `against` names for a row.
    """
    rates: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, run in timed.items():
            rates[name].append(run())
    base = {name: rates[(against or {}).get(name, "authors")] for name in rates}
    return [Row(n, r, ratios(r, base[n])) for n, r in rates.items()]


def ratios(rates: Sequence[float], base: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(rates, base, strict=True)]


def report(
    bench: str,
    rows: list[Row],
    about: dict[str, Any],
    console: Console,
    file: Path | None,
    said: Sequence[str] = (),
    hidden: Sequence[str] = (),
) -> None:
    """Prints the table, without the columns `hidden`, and what else is said; writes `{"bench", "hardware", "rows"}`
    where a file is named."""
    from ..run_folder import write_json

    table = Table(title=f"bench {bench}", title_justify="left")
    more = list(dict.fromkeys(key for row in rows for key in row.more if key not in hidden))
    for heading in (
        "",
        "images/s",
        "p10",
        "p90",
        "× authors",
        *(name.replace("_", " ") for name in more),
    ):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        d = row.to_dict()
        numbers = [f"{d[k]:,.0f}" for k in ("median", "p10", "p90")]
        table.add_row(d["name"], *numbers, *(_number(d.get(k)) for k in ("times_authors", *more)))
    console.print(table)
    for line in said:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if file is not None:
        found = {
            "bench": bench,
            "date": date.today().isoformat(),
            **about,
            "rows": [r.to_dict() for r in rows],
        }
        write_json(file, found | ({"said": list(said)} if said else {}))
        console.print(f"written: {file}", markup=False, highlight=False, soft_wrap=True)


def _number(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.2f}" if value == 0 or abs(value) >= 0.1 else f"{value:.1e}"


def _percentile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[round(q * (len(ordered) - 1))]
