"""`bench zoo` on three networks; failures, and networks that end or hang their process."""

from __future__ import annotations

import json

import pytest
from hanging import hang_or_end
from rich.console import Console

import attention_transfer as at
from attention_transfer.bench import zoo


def test_three_networks(tmp_path):
    file = tmp_path / "zoo.json"
    zoo.bench_zoo(Console(quiet=True), file, limit=3)
    found = json.loads(file.read_text())
    assert found["bench"] == "zoo" and found["hardware"]["cores"] and found["failures"] == []
    *families, total = found["rows"]
    assert [total[k] for k in ("name", "models", "traced", "read", "paired")] == ["all", 3, 3, 3, 3]
    assert sum(row["models"] for row in families) == 3
    page = file.with_suffix(".md").read_text()
    assert (
        f"3 of the {found['of']}" in page
        and "| all | 3 | 3 | 3 | 3 |" in page
        and "Nothing." in page
    )


def test_a_sample_is_spread_over_the_list():
    names = [f"n{k}" for k in range(10)]
    assert zoo.sample(names, None) == zoo.sample(names, 10) == zoo.sample(names, 99) == names
    assert zoo.sample(names, 3) == ["n0", "n3", "n6"]
    with pytest.raises(at.UserError, match="--limit is 0: expected at least 1"):
        zoo.sample(names, 0)


def test_a_failure_has_its_reason():
    row = zoo.examine("no_such_network")
    assert not row["traced"] and not row["paired"] and "no_such_network" in row["reason"]


def test_a_network_that_hangs_or_ends_its_process(monkeypatch):
    monkeypatch.setattr(zoo, "_serve", hang_or_end)
    with zoo._Worker(seconds=1.0) as worker:
        assert worker.examine("hangs")["reason"] == "took longer than 1 s"
    with zoo._Worker(seconds=30.0) as worker:
        for _ in range(2):  # a new process each time
            assert worker.examine("ends")["reason"] == "ended its process (status 7)"
        assert worker.process is None


def test_the_table():
    def row(family, stages, pairs, reason=None):
        done = {"traced": stages > 0, "read": stages > 0, "paired": pairs > 0}
        return {
            "name": family,
            "family": family,
            **done,
            "stages": stages,
            "pairs": pairs,
            "reason": reason,
        }

    rows = zoo.summary(
        [row("vit", 1, 1), row("cnn", 4, 4), row("cnn", 5, 4), row("cnn", 0, 0, "why")]
    )
    assert [zoo._cells(r) for r in rows] == [
        ["cnn", "3", "2", "2", "2", "4–5", "4"],
        ["vit", "1", "1", "1", "1", "1", "1"],
    ]
