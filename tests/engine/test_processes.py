"""Two processes train as one does: the same images a step, the same numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch.distributed
from small_runs import FLAGS, carry_out, rows, small, write_factory

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_against_one(tmp_path):
    model = write_factory(tmp_path)  # without batch normalisation, whose statistics are each process's own
    words = f"train --model {model} {FLAGS} --precision fp32 --devices 2 --out two".split()
    command = [sys.executable, "-m", "attention_transfer", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("error, loss") == 1
    carry_out(small(model=model, precision="fp32"), tmp_path / "one")
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two) == 2
    for alone, shared in zip(one, two, strict=True):
        for key in ("train_loss", "val_loss", "train_accuracy", "val_accuracy"):
            assert shared[key] == pytest.approx(alone[key], abs=1e-3)
        assert shared["parts"] == pytest.approx(alone["parts"], abs=1e-3)
        assert (shared["epoch"], shared["step"], shared["lr"]) == (alone["epoch"], alone["step"], alone["lr"])
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["epochs"] == 2
