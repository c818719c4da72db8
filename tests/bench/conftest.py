"""Settings that take a moment, and benches whose baselines run in the process of the test."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import torch

from attention_transfer.bench import BenchOptions, authors, teacher
from attention_transfer.bench.measure import timed

SMALL = BenchOptions(
    student="wrn-10-1",
    teacher="wrn-10-1",
    batch_size=8,
    rounds=1,
    steps=1,
    images=24,
    device="cpu",
    compile="off",
)


@pytest.fixture
def small():
    return SMALL


@pytest.fixture
def same_process(monkeypatch):
    """Subprocesses are tested by test_in_subprocess.py."""
    for module in (authors, teacher):
        monkeypatch.setattr(module, "in_subprocess", run_here)
    return run_here


@contextmanager
def run_here(make, options, device, loader=None, size=32):
    step = make().to("cpu")
    x = torch.rand(options.batch_size, 3, size, size)
    y = torch.randint(10, (options.batch_size,))
    yield timed(lambda: step(x, y), 1, options.batch_size)


@pytest.fixture
def read_rows():
    return check_rows


def check_rows(file, bench):
    """The rows by name, and the whole JSON, which every bench writes in one format."""
    result = json.loads(file.read_text())
    assert result["bench"] == bench and result["hardware"]["cores"]
    assert result["rows"][0]["times_authors"] == 1
    for row in result["rows"]:
        assert 0 < row["p10"] <= row["median"] <= row["p90"]
    return {row["name"]: row for row in result["rows"]}, result
