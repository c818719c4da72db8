"""Any table file: it is planned, or a line names the file or the option; nothing executes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fuzzing import VALUES, changed_files, check_command, contents, fuzz, replaced
from hypothesis import given
from hypothesis import strategies as st

from attention_transfer.config import Recipe
from attention_transfer.options import option_specs
from attention_transfer.studies.options import TABLES
from attention_transfer.studies.table_file import read_table

KEYS = sorted(option_specs(Recipe))
PLACES = ("options", "teacher_options", "settings.AT", "rows.0.options", "rows.0.teacher_options")
RECIPE_VALUES = VALUES | st.sampled_from(
    [
        "at",
        "kd",
        "full",
        "auto",
        "evil.py:make",
        "cifar10:nowhere",
        "digits",
        "none",
        "1e-3",
        "step",
    ]
)
TINY: dict[str, Any] = {
    "title": "Tiny table",
    "options": {"data": "digits", "limit_val": 100, "batch_size": 32, "flip": False},
    "teacher_options": {"epochs": 1},
    "settings": {"student alone": {"method": "none"}, "AT": {"method": "at", "beta": 1.0}},
    "rows": [
        {
            "student": "wrn-10-1",
            "teacher": "wrn-10-2",
            "options": {"epochs": 2},
            "teacher_options": {"lr": 0.1},
            "published": {"student alone": 50.0},
        }
    ],
}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("open('executed', 'w')\n")
    Path("mine.txt").write_text("mine")
    return tmp_path


@st.composite
def tables(draw: Any) -> Any:
    """A table with some values replaced, or with keys of a recipe where they may stand."""
    if draw(st.integers(0, 4)) == 0:
        table = read_table(draw(st.sampled_from(TABLES))).model_dump()
    else:
        table = copy.deepcopy(TINY)
    for _ in range(draw(st.sampled_from([0, 1, 1, 2]))):
        random = np.random.default_rng(draw(st.integers(0, 10**9)))
        table = replaced(table, random, draw(VALUES))
    for _ in range(draw(st.sampled_from([0, 1, 1, 2]))):
        node = table
        for step in draw(st.sampled_from(PLACES)).split("."):
            if isinstance(node, dict):
                node = node.get(step)
            elif isinstance(node, list):
                node = node[0] if node else None
        if isinstance(node, dict):
            node[draw(st.sampled_from(KEYS))] = draw(RECIPE_VALUES)
    return table


def check(place: Path, table: Any, line: str) -> None:
    Path("mine.yaml").write_text(yaml.safe_dump(table, sort_keys=False), encoding="utf-8")
    before = contents(place)
    # The settings of the table are the options of its runs, whose errors name them.
    known = ("mine.yaml", "--data", "wrn-", "nin-", "rows", *KEYS)
    known += tuple(key.replace("_", "-") for key in KEYS)
    check_command(line.split(), lambda error: any(word in error for word in known))
    changed = changed_files(before, contents(place))
    assert all(file.startswith("out/") for file in changed), changed


@fuzz(60)
@given(table=tables())
def test_any_table_is_planned(place, monkeypatch, table):
    monkeypatch.setattr("attention_transfer.studies.reproduce.carry_out_plan", lambda *_: False)
    check(place, table, "reproduce mine.yaml --seeds 2 --out out")


@fuzz(4, share=0.02)
@given(table=tables())
def test_any_table_is_measured(place, table):
    line = "reproduce mine.yaml --seeds 1 --dry-run --epochs 1 --limit-train 64 --device cpu"
    check(place, table, f"{line} --compile off --out out")
