"""Damaged stores: they are read, or a line names the folder; nothing else changes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import (
    VALUES,
    changed_array,
    changed_files,
    check_command,
    contents,
    damage,
    fuzz,
    no_hang,
)
from hypothesis import given
from hypothesis import strategies as st
from small_runs import FLAGS
from toys import Net, batch

import attention_transfer as at
from attention_transfer import cli
from attention_transfer.errors import RunError, UserError
from attention_transfer.store.create import create_store
from attention_transfer.store.store import TeacherStore

IMAGES, VIEWS = 10, 2
KINDS = ("cut", "flip", "replace", "remove", "folder", *["value"] * 8)
TEACH = "teach --teacher teacher --data digits --views 2 --top-k 3 --device cpu --compile off"
LINES = (
    f"distill --student wrn-10-1 --teacher store --method at+kd {FLAGS} --max-steps 1 --out new",
    f"distill --student wrn-10-1 --teacher teacher --method kd {FLAGS} --max-steps 1 --views 2 "
    "--top-k 3 --store store --out new",
    f"{TEACH} --out store",
)


def outputs(layers: Any = ("one", "two", "three")) -> Any:
    with torch.no_grad(), at.tap(Net(8, seed=1), layers) as tapped:
        return tapped(batch()[0])


@pytest.fixture
def filled(tmp_path, monkeypatch) -> Path:
    """A folder with a store that has all rows but two."""
    monkeypatch.chdir(tmp_path)
    store = create_store(
        "whole", Net(8, seed=1), batch()[0], images=IMAGES, views=VIEWS, data="ten images", top_k=2
    )
    logits, features = outputs()
    for view in range(VIEWS):
        for first in (0, 4):
            store.add(torch.arange(first, first + 4), view, logits, features)
    Path("mine.txt").write_text("mine")
    return tmp_path


def injure(file: Path, kind: str, seed: int, value: Any) -> None:
    """As `damage`, which knows no .npy files."""
    if kind != "value" or file.suffix != ".npy":
        damage(file, kind, seed, value)
        return
    random = np.random.default_rng(seed)
    array = np.load(file)
    if random.random() < 0.5:
        array = changed_array(array, random, value)
    else:
        array.reshape(-1)[random.integers(0, array.size, 5)] = random.integers(-128, 127)
    if array.dtype != object:
        np.save(file, array)


@fuzz(150)
@given(data=st.data(), kind=st.sampled_from(KINDS), seed=st.integers(0, 10**9), value=VALUES)
def test_a_damaged_store_in_python(filled, data, kind, seed, value):
    shutil.rmtree("store", ignore_errors=True)
    shutil.copytree("whole", "store")
    names = sorted(file.name for file in Path("whole").glob("*.*") if file.name[0] != ".")
    name = data.draw(st.sampled_from([*names, *["store.json"] * len(names)]))
    injure(Path("store") / name, kind, seed, value)
    before = contents(filled)
    rows = torch.tensor([3, 1])
    with no_hang():
        try:
            store = TeacherStore("store")
            read = store.read_if_filled(rows, 1)
            assert read is None or read.logits.shape == (2, store.classes)
            store.sample(3)
            store.add(torch.arange(6, 10), 1, *outputs())
        except (UserError, RunError) as error:
            # What is added need not fit a header that was changed to another teacher's.
            known = ("store", "of the teacher", "the teacher's", "features has", "rows are")
            text = str(error)
            assert any(word in text for word in known) and "\n" not in text, text
    changed = changed_files(before, contents(filled))
    assert all(file.startswith("store/") for file in changed)


@pytest.fixture
def place(teacher_run, quick_runs, tmp_path, monkeypatch) -> Path:
    """A folder with a teacher and a store of its outputs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher_run, "teacher")
    line = f"{TEACH} --out whole"
    cli.main(line.split())
    Path("mine.txt").write_text("mine")
    return tmp_path


@fuzz(10, share=0.05)
@given(data=st.data(), line=st.sampled_from(LINES), kind=st.sampled_from(KINDS),
       seed=st.integers(0, 10**9), value=VALUES)  # fmt: skip
def test_a_damaged_store_in_a_command(place, data, line, kind, seed, value):
    for folder in ("store", "new"):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree("whole", "store")
    names = sorted(file.name for file in Path("whole").glob("*.*") if file.name[0] != ".")
    name = data.draw(st.sampled_from([*names, *["store.json"] * len(names)]))
    injure(Path("store") / name, kind, seed, value)
    before = contents(place)
    check_command(line.split(), lambda error: "store" in error or "new" in error)
    changed = changed_files(before, contents(place))
    assert all(file.startswith(("store/", "new/")) for file in changed), changed
