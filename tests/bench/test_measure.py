"""Interleaving, the table and its JSON."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from attention_transfer.bench.measure import BenchRow, interleave, median_ratio, report
from attention_transfer.bench.workload import start


def test_ratios_are_to_the_baseline_of_a_row():
    rates = {"authors": lambda: 2.0, "a": lambda: 6.0, "base": lambda: 4.0, "b": lambda: 12.0}
    rows = interleave(rates, 2, {"base": "base", "b": "base"})
    assert [row.ratios for row in rows] == [[1, 1], [3, 3], [1, 1], [3, 3]]
    assert median_ratio(rows[3], rows[0]) == 6


@pytest.mark.parametrize("warm_up", [True, False])
def test_each_round_measures_every_candidate(warm_up):
    calls = []

    def measure(name):
        return lambda: calls.append(name) or float(len(calls))

    rows = interleave({n: measure(n) for n in ("authors", "ours")}, 2, warm_up=warm_up)
    assert calls == ["authors", "ours"] * (2 + warm_up)
    first = 3.0 if warm_up else 1.0
    assert rows[1].rates == [first + 1, first + 3]


def test_the_report(tmp_path, small):
    rows = [
        BenchRow("authors", [100.0, 300.0, 200.0], [1.0, 1.0, 1.0]),
        BenchRow("ours", [1500.0], [7.5], {"share": 0.012, "note": "fast"}),
    ]
    console = Console(record=True, width=100)
    runtime = replace(start(small)[0], threads=torch.get_num_threads())
    report("step", rows, small, runtime, console, tmp_path / "x.json", ["[a note]"])
    text = console.export_text()
    assert "1,500" in text and "1.2e-02" in text and "fast" in text and "\n[a note]\n" in text
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["bench"] == "step" and result["notes"] == ["[a note]"]
    assert result["settings"]["student"] == "wrn-10-1" and result["commit"] is not None
    assert result["rows"][0] == {
        "name": "authors",
        "median": 200.0,
        "p10": 100.0,
        "p90": 300.0,
        "times_authors": 1.0,
    }
