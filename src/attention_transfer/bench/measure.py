"""Times several candidates, interleaved, and reports the result as a table and JSON."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..run_folder import write_json
from ..runtime.environment import environment
from ..runtime.resolve import RuntimeConfig, synchronize
from .options import BenchOptions

Measure = Callable[[], float]  # runs once and returns images/s
CPU = torch.device("cpu")
HEADINGS = {"name": "", "median": "images/s", "times_authors": "× authors"}


@dataclass
class BenchRow:
    """Images/s of one candidate, a value per round, and their ratios to the baseline's."""

    name: str
    rates: list[float]
    ratios: list[float]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    def to_dict(self) -> dict[str, Any]:
        # Percentiles by nearest rank, because there are few rounds.
        ordered = sorted(self.rates)
        last = len(ordered) - 1
        return {
            "name": self.name,
            "median": self.median,
            "p10": ordered[round(0.1 * last)],
            "p90": ordered[round(0.9 * last)],
            "times_authors": statistics.median(self.ratios),
            **self.extra,
        }


def interleave(
    measures: Mapping[str, Measure],
    rounds: int,
    baselines: Mapping[str, str] | None = None,
    warm_up: bool = True,
) -> list[BenchRow]:
    """Measures each candidate in turn, round after round.

    The speed of a machine drifts; with interleaving, the drift affects all candidates equally.
    `baselines` has the name of a row's baseline if it is not `authors`. With `warm_up` each
    candidate runs once before the first round, which compiles it.
    """
    if warm_up:
        for measure in measures.values():
            measure()
    rates: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            rates[name].append(measure())
    rows = []
    for name, values in rates.items():
        # Ratios within a round, because the machine's speed is then about the same for both.
        baseline = rates[(baselines or {}).get(name, "authors")]
        rows.append(BenchRow(name, values, ratios(values, baseline)))
    return rows


def ratios(rates: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Ratios within each round."""
    return [rate / base for rate, base in zip(rates, baseline, strict=True)]


def median_ratio(row: BenchRow, baseline: BenchRow) -> float:
    return statistics.median(ratios(row.rates, baseline.rates))


def timed(
    run: Callable[[], object], calls: int, images: int, device: torch.device = CPU
) -> Measure:
    """Measures `calls` calls of `run`, each of which works on `images` images."""

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        return calls * images / (time.perf_counter() - start)

    return measure


def report(
    bench: str,
    rows: Sequence[BenchRow],
    options: BenchOptions,
    runtime: RuntimeConfig,
    console: Console,
    json_file: Path | None,
    notes: Sequence[str] = (),
) -> None:
    """Prints the table with the notes below it, and writes both to `json_file`, if given."""
    records = [row.to_dict() for row in rows]
    # Rows may have different extra columns.
    keys = list(dict.fromkeys(key for record in records for key in record))
    table = Table(title=f"bench {bench}", title_justify="left")
    for key in keys:
        heading = HEADINGS.get(key, key.replace("_", " "))
        table.add_column(heading, justify="left" if key == "name" else "right")
    for record in records:
        table.add_row(*(_cell(key, record.get(key)) for key in keys))
    console.print(table)
    for note in notes:
        console.out(note)
    if json_file is None:
        return
    result = {
        "bench": bench,
        "date": date.today().isoformat(),
        **environment(runtime),
        "settings": vars(options),
        "rows": records,
        "notes": list(notes),
    }
    write_json(json_file, result)
    console.out(f"written: {json_file}")


def _cell(key: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if key in ("median", "p10", "p90"):
        return f"{value:,.0f}"
    if value == 0 or abs(value) >= 0.1:
        return f"{value:.2f}"
    return f"{value:.1e}"
