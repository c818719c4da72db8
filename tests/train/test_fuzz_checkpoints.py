"""Checkpoints with other contents: the run continues, or a line names the file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import VALUES, changed_files, check_command, contents, fuzz
from hypothesis import assume, given
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


def entries(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys of each entry of nested dicts and lists."""
    if isinstance(tree, (dict, list)):
        for key, entry in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield (*place, key)
            yield from entries(entry, (*place, key))


@fuzz(12, share=0.1)
@given(data=st.data(), both=st.booleans())
def test_any_checkpoint(place, data, both):
    shutil.rmtree("run", ignore_errors=True)
    shutil.copytree("whole", "run")
    state = torch.load("run/checkpoint.pt", weights_only=True)
    *keys, last = data.draw(st.sampled_from(list(entries(state))))
    parent = state
    for key in keys:
        parent = parent[key]
    if isinstance(parent[last], torch.Tensor) and data.draw(st.booleans()):
        parent[last] = TENSORS[data.draw(st.sampled_from(list(TENSORS)))](parent[last])
    elif isinstance(parent, dict) and data.draw(st.integers(0, 9)) == 0:
        # A parameter that has no gradient has no state, so a lost state cannot be told from it.
        assume(keys != ["optimizer", "state"])
        del parent[last]
    else:
        parent[last] = data.draw(VALUES)
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
