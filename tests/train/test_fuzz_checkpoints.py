"""Checkpoints with other contents: the run continues, or a line names the file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import VALUES, changed_files, check_command, contents, fuzz, replaced
from hypothesis import given
from hypothesis import strategies as st
from small_runs import carry_out as train
from small_runs import distilled, request_stop, stop_after

from attention_transfer.train.signals import Interrupted

TENSORS = {
    "nan": lambda tensor: tensor.float() * float("nan"),
    "other shape": lambda tensor: tensor[None],
    "empty": lambda tensor: tensor.flatten()[:0],
    "whole numbers": lambda tensor: tensor.long(),
    "double": lambda tensor: tensor.double(),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": lambda tensor: tensor.to_sparse() if tensor.ndim else tensor,
    "zeros": torch.zeros_like,
    "expanded": lambda tensor: torch.zeros(()).expand(10**9),
}


@pytest.fixture(scope="module")
def stopped(teacher_run, tmp_path_factory) -> Path:
    """A folder with a teacher, a run that was stopped in its second epoch, and its recipe."""
    place = tmp_path_factory.mktemp("stopped")
    shutil.copytree(teacher_run, place / "teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        stop_after(patch, 6, request_stop)
        with pytest.raises(Interrupted):
            train(distilled(Path("teacher"), ema=0.9), Path("whole"))
    shutil.copy(place / "whole" / "config.yaml", place / "recipe.yaml")
    return place


@pytest.fixture
def place(stopped, quick_runs, monkeypatch, tmp_path) -> Path:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_tensor(tree: Any, random: np.random.Generator, kind: str) -> Any:
    """A copy of a tree with one of its tensors changed."""
    if isinstance(tree, torch.Tensor):
        return TENSORS[kind](tree)
    if not isinstance(tree, (dict, list)) or not tree:
        return tree
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = keys[random.integers(0, len(keys))]
    changed = with_tensor(tree[key], random, kind)
    if isinstance(tree, dict):
        return {**tree, key: changed}
    return [*tree[:key], changed, *tree[key + 1 :]]


@fuzz(12, share=0.1)
@given(
    kind=st.sampled_from(["value", "value", *TENSORS]), seed=st.integers(0, 10**9), value=VALUES,
    both=st.booleans(),
)  # fmt: skip
def test_any_checkpoint(place, kind, seed, value, both):
    shutil.rmtree("run", ignore_errors=True)
    shutil.copytree("whole", "run")
    random = np.random.default_rng(seed)
    state = torch.load("run/checkpoint.pt", weights_only=True)
    state = replaced(state, random, value) if kind == "value" else with_tensor(state, random, kind)
    try:
        torch.save(state, "run/checkpoint.pt")
    except Exception:
        return  # torch does not write it, so nobody has such a file
    if both:
        shutil.copy("run/checkpoint.pt", "run/checkpoint-previous.pt")
    before = contents(place)
    known = ("checkpoint.pt", "run", "loss", "gradient", "the weights are not finite")
    line = "distill --config recipe.yaml --out run"
    check_command(line.split(), lambda error: any(word in error for word in known))
    changed = changed_files(before, contents(place))
    assert all(file.startswith("run/") for file in changed), changed
