"""The teacher runs once on each fixed view: its outputs are stored, and read from then on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from small_runs import STEPS_PER_EPOCH, carry_out, distilled, rows, small, write_factory
from test_continuing import assert_same_end, interrupt, kill

from attention_transfer.config import make_recipe
from attention_transfer.errors import UserError
from attention_transfer.store.store import TeacherStore

VIEWS, EPOCHS = 2, 3


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A teacher, and a finished run that filled `store` from it, for reading only."""
    from small_runs import _quick

    folder = tmp_path_factory.mktemp("taught")
    with _quick():
        model = write_factory(folder, "make_normalised")
        carry_out(small(model=model, epochs=1), folder / "teacher")
        said = carry_out(recipe(folder, store=str(folder / "store")), folder / "run")
    (folder / "said").write_text(said)
    return folder


def recipe(folder, teacher=None, **options):
    options = {"views": VIEWS, "epochs": EPOCHS, "precision": "fp32", "trust_code": True} | options
    model = f"{folder / 'net.py'}:make_normalised"
    return distilled(teacher or folder / "teacher", model=model, **options)


@pytest.fixture(autouse=True)
def teacher_calls(quick_runs, monkeypatch, tmp_path):
    """The sizes of the batches for which the teacher ran. The cache is a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []
    original = TeacherStore.add

    def counted(self, rows, *outputs):
        calls.append(len(rows))
        return original(self, rows, *outputs)

    monkeypatch.setattr(TeacherStore, "add", counted)
    return calls


def test_what_a_run_says_of_its_store(taught):
    said = (taught / "said").read_text()
    assert f"2 views of 128 images are stored in {taught / 'store'} (0.7 MB, " in said
    assert "float16); 12% are computed already" in said
    record = json.loads((taught / "run" / "environment.json").read_text())
    assert record["store"] == str(taught / "store")


def test_the_teacher_runs_until_all_views_are_there(taught, tmp_path, teacher_calls):
    """Without --store the outputs are in the cache, and other seeds and methods read them."""
    carry_out(recipe(taught), tmp_path / "first")
    examples = 1  # for β
    assert teacher_calls == [32] * (examples + VIEWS * STEPS_PER_EPOCH)
    assert rows(tmp_path / "first") == rows(taught / "run")
    (store,) = (tmp_path / "cache/attention-transfer/stores").iterdir()
    teacher_calls.clear()
    said = carry_out(recipe(taught, epochs=1, method="kd"), tmp_path / "kd")
    assert f"{store} (" in said and "100% are computed already" in said
    assert teacher_calls == []


def test_a_store_in_the_teachers_place(taught, tmp_path, teacher_calls):
    """It needs no network, and the student is the same to the bit."""
    run = tmp_path / "run"
    said = carry_out(recipe(taught, taught / "store"), run)
    assert teacher_calls == [] and "a map (16, 16)" in said
    assert (run / "student.safetensors").read_bytes() == (
        taught / "run" / "student.safetensors"
    ).read_bytes()
    assert rows(run) == rows(taught / "run")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["teacher"]["store"] == str(taught / "store")
    assert (run / "report.html").is_file()
    assert "is finished" in carry_out(recipe(taught, taught / "store"), run)
    automatic = make_recipe(recipe(taught, taught / "store").to_dict(), {"views": "auto"})
    assert automatic.views == VIEWS  # those of the store


@pytest.mark.parametrize("step", [2, STEPS_PER_EPOCH + 2, 2 * STEPS_PER_EPOCH + 1])
def test_killed_and_continued(taught, tmp_path, step):
    """In the epochs that fill the store, and in one that reads it."""
    again = recipe(taught, store=str(tmp_path / "store"))
    kill(again, tmp_path / "run", step)
    carry_out(again, tmp_path / "run")
    assert_same_end(tmp_path / "run", taught / "run")


def test_interrupted_in_the_first_epoch(taught, tmp_path):
    again = recipe(taught, store=str(tmp_path / "store"))
    interrupt(again, tmp_path / "run", 2)
    carry_out(again, tmp_path / "run")
    assert_same_end(tmp_path / "run", taught / "run")


def test_micro_batches(taught, tmp_path):
    """Of a network without batch normalisation in the student, parts add up to the whole."""
    model = f"{taught / 'net.py'}:make"
    options = {"views": VIEWS, "epochs": 2, "precision": "fp32", "trust_code": True}
    for out, accumulate in (("whole", 1), ("parts", 3)):
        again = distilled(
            taught / "teacher",
            model=model,
            store=str(tmp_path / f"store-{out}"),
            accumulate=accumulate,
            beta=1.0,
            method="at+kd",
            **options,
        )
        carry_out(again, tmp_path / out)
    for whole, parts in zip(rows(tmp_path / "whole"), rows(tmp_path / "parts"), strict=True):
        assert parts["train_loss"] == pytest.approx(whole["train_loss"], abs=1e-4)
        assert parts["parts"] == pytest.approx(whole["parts"], abs=1e-4)


def test_streamed(taught, tmp_path):
    """Images in files, decoded while training, say the same as in memory."""
    from small_runs import write_folder

    data = write_folder(tmp_path / "data", classes=4, train=8, val=2, size=16)
    common = {"data": f"folder:{data}", "limit_train": None, "limit_val": None, "batch_size": 8}
    model = f"{taught / 'net.py'}:make"
    carry_out(small(model=model, epochs=1, **common), tmp_path / "teacher")
    for stream in ("on", "off"):
        again = distilled(
            tmp_path / "teacher",
            model=model,
            views=VIEWS,
            trust_code=True,
            precision="fp32",
            stream=stream,
            workers=0,
            store=str(tmp_path / f"store-{stream}"),
            **common,
        )
        carry_out(again, tmp_path / stream)
    for on, off in zip(rows(tmp_path / "on"), rows(tmp_path / "off"), strict=True):
        assert on["parts"] == pytest.approx(off["parts"], rel=1e-3)
    for file in ("logits.npy", "one.sum2.npy", "one.sum2.filled.npy"):
        one, other = (np.load(tmp_path / f"store-{stream}" / file) for stream in ("on", "off"))
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3)


def test_methods_that_need_the_teacher_keep_nothing(taught, tmp_path, teacher_calls):
    again = recipe(taught, method="at+full", epochs=1, beta={"at": 1.0})
    assert "are kept in" not in carry_out(again, tmp_path / "run")
    assert not (tmp_path / "cache").exists() and not teacher_calls
    with pytest.raises(UserError, match="FullActivationTransfer cannot learn from a store: it"):
        carry_out(recipe(taught, taught / "store", method="full"), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 3}, "a store of other outputs: views is 2 in the store and 3 in this command"),
        (
            {"crop_padding": 2},
            "a store of other outputs: crop_padding is 4 in the store and 2 in this command",
        ),
        ({"top_k": 3}, "top_k is all in the store and 3 in this command"),
        ({"teacher_weights": "x.pt"}, "is a store and has no weights"),
        ({"kind": "max"}, r"has the maps one\.sum2, two\.sum2: expected|no stage of the student"),
        ({"limit_train": 256}, "lacks .* of the .* views of images that this run needs"),
    ],
)
def test_a_store_of_something_else_in_the_teachers_place(taught, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        carry_out(recipe(taught, taught / "store", **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_store_of_another_teacher(taught, tmp_path):
    model = f"{taught / 'net.py'}:make_normalised"
    carry_out(small(model=model, epochs=1, max_steps=1, seed=5), tmp_path / "teacher")
    with pytest.raises(UserError, match="is the store of another teacher"):
        carry_out(
            recipe(taught, tmp_path / "teacher", store=str(taught / "store")), tmp_path / "run"
        )


def test_a_full_disk_in_the_first_epoch(taught, tmp_path, monkeypatch, teacher_calls):
    """The run goes on, says it once, and learns the same."""
    import errno
    import os

    from attention_transfer.store import arrays

    pwrite, calls = os.pwrite, []

    def full(*words):
        calls.append(words)
        if len(calls) > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(*words)

    monkeypatch.setattr(arrays.os, "pwrite", full)
    said = carry_out(recipe(taught, store=str(tmp_path / "store")), tmp_path / "run")
    assert said.count("cannot be written (No space left on device): the run goes on") == 1
    assert len(teacher_calls) > VIEWS * STEPS_PER_EPOCH
    one, other = (
        torch.tensor(row["train_loss"])
        for row in (rows(tmp_path / "run")[-1], rows(taught / "run")[-1])
    )
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
