"""The files in examples/ run as they stand, and are short."""

import importlib.util
import runpy
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples"
NEEDS = {"transformers_trainer.py": "transformers", "accelerate_loop.py": "accelerate"}


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.py")))
def test_runs(name, monkeypatch, capfd):
    needed = NEEDS.get(name, "torch")
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with torch.random.fork_rng():
        runpy.run_path(str(FOLDER / name), run_name="__main__")
    assert capfd.readouterr().out
    assert len((FOLDER / name).read_text().splitlines()) < 60
