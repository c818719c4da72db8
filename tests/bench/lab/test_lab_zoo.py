"""The zoo on three networks; failures, and networks that end or hang their process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zoo
from rich.console import Console
from zoo_hanging import hang_or_end

import attention_transfer as at


def test_three_networks(tmp_path):
    file = tmp_path / "zoo.json"
    zoo.run(3, Console(quiet=True), file)
    result = json.loads(file.read_text())
    assert result["bench"] == "zoo" and result["hardware"]["cores"] and result["failures"] == []
    *families, total = result["rows"]
    assert [total[k] for k in ("name", "models", "traced", "read", "paired")] == ["all", 3, 3, 3, 3]
    assert sum(row["models"] for row in families) == 3
    page = file.with_suffix(".md").read_text()
    assert (
        f"3 of {result['of']}, at equal" in page
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
    with zoo.Examiner(seconds=1.0) as examiner:
        assert examiner.examine("hangs")["reason"] == "took longer than 1 s"
    with zoo.Examiner(seconds=30.0) as examiner:
        for _ in range(2):  # a new process each time
            assert examiner.examine("ends")["reason"] == "ended its process (status 7)"
        assert examiner.process is None


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

    *rows, _ = zoo.summarize(
        [row("vit", 1, 1), row("cnn", 4, 4), row("cnn", 5, 4), row("cnn", 0, 0, "why")]
    )
    assert [zoo._cells(r) for r in rows] == [
        ["cnn", "3", "2", "2", "2", "4–5", "4"],
        ["vit", "1", "1", "1", "1", "1", "1"],
    ]


def test_the_page_agrees_with_the_file():
    results = Path(zoo.__file__).parents[1] / "results"
    result = json.loads((results / "zoo.json").read_text())
    assert (results / "zoo.md").read_text() == zoo.markdown(result)
