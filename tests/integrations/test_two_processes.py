"""In each integration, two processes train the student that one process trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import loops
import pytest
import torch
from toys import assert_same

NEEDS = {"timm": "timm.task"}
TESTS = Path(__file__).parents[1]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("loop", loops.LOOPS)
def test_two_processes_train_as_one(loop, tmp_path):
    pytest.importorskip(NEEDS.get(loop, loop))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, loops.__file__, loop, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert_same(first, second, rtol=0, atol=0)
    assert_same(first, loops.train(loop, tmp_path), rtol=1e-4, atol=1e-6)
