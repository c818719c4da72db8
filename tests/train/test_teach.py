"""The command `teach`, and students that learn from its store."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch.distributed
from small_runs import carry_out, small, write_factory, write_folder

from attention_transfer.store.store import TeacherStore

CLASSES, IMAGES = 3, 24  # training images
VIEWS = "--views 2 --batch-size 10"
MACHINE = "--device cpu --precision fp32 --compile off"


@pytest.fixture
def place(tmp_path, quick_runs):
    """Images in files, and a teacher; the working folder of `command`."""
    data = write_folder(tmp_path / "data", classes=CLASSES, train=8, val=2, size=16)
    options = {"data": f"folder:{data}", "limit_train": None, "limit_val": None, "batch_size": 8}
    model = write_factory(tmp_path, "make_normalised")
    carry_out(small(model=model, epochs=1, **options), tmp_path / "teacher")
    return tmp_path


TEACH = f"teach --teacher teacher --trust-code --data folder:data {VIEWS} {MACHINE}"


def test_teach_and_learn(place, command):
    said = command(f"{TEACH} --out store --dry-run")
    assert said.status == 0 and not (place / "store").exists(), said.err
    assert "one.sum2" in said.out and "2 views of 24 images in float16: 0.0 MB" in said.out
    assert "MB of the disk are free" in said.out

    said = command(f"{TEACH} --out store")
    assert said.status == 0 and "distill --teacher store learns from it" in said.out, said.err
    store = TeacherStore(place / "store")
    assert store.count_missing(torch.arange(IMAGES), range(2)) == 0
    numbers = store.header.teacher.numbers
    assert set(numbers) == {"parameters", "flops", "val_accuracy", "val_loss"}

    line = "distill --teacher store --student net.py:make --epochs 2 --batch-size 8 --beta 1"
    said = command(f"{line} {MACHINE} --out run")
    assert said.status == 0, said.err
    recipe = (place / "run" / "config.yaml").read_text()
    assert "views: 2" in recipe and "data: folder:data" in recipe
    summary = json.loads((place / "run" / "summary.json").read_text())
    assert summary["teacher"]["val_accuracy"] == numbers["val_accuracy"]
    assert "teacher (store)" in (place / "run" / "report.html").read_text()
    said = command("compare run")
    assert said.status == 0 and "(store)" in said.out

    said = command(f"{line} --store other --out refused")
    assert said.status == 2 and "--teacher is a store itself" in said.err


def test_teach_goes_on(place, command, monkeypatch):
    """The second command computes what is missing only, to the same files."""
    assert command(f"{TEACH} --out whole").status == 0
    original, calls = TeacherStore.add, []

    def stop(self, rows, *said):
        calls.append(rows.tolist())
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(self, rows, *said)

    monkeypatch.setattr(TeacherStore, "add", stop)
    assert command(f"{TEACH} --out store").status == 130
    calls.clear()
    calls.append([])
    assert command(f"{TEACH} --out store").status == 0
    assert sorted({row for rows in calls for row in rows}) == list(range(10, 24))
    for name in ("logits.npy", "two.sum2.npy", "one.sum2.filled.npy"):
        one, other = (np.load(place / out / name) for out in ("store", "whole"))
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
    assert command(f"{TEACH} --out store").status == 0


def test_batches_of_unreadable_images_only(place, command):
    """They stay out of the store; the same command, to which nothing else is left, agrees."""
    for number in range(4, 8):
        (place / "data" / "train" / "class00" / f"{number}.png").write_bytes(b"no image")
    line = f"{TEACH.replace('--batch-size 10', '--batch-size 4')} --stream on --workers 0"
    for _ in range(2):
        said = command(f"{line} --on-bad-image skip --out store")
        assert said.status == 0 and "8 views are of images that cannot be read" in said.out
    assert TeacherStore(place / "store").count_missing(torch.arange(IMAGES), range(2)) == 8
    said = command(f"{line} --out other")
    assert said.status == 2 and "class00/4.png" in said.err


def started(line, **environment):
    """The processes of `teach`, started by torchrun if there are several."""
    launcher = [sys.executable, "-m"]
    count = environment.pop("count", 1)
    if count > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m"]
    return subprocess.run(
        [*launcher, "attention_transfer", *line.split()],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_each_process_of_torchrun_fills_its_share(place, monkeypatch):
    monkeypatch.chdir(place)
    said = started(f"{TEACH} --out store --json numbers.json", count=2)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("distill --teacher store learns from it") == 1
    assert TeacherStore(place / "store").count_missing(torch.arange(IMAGES), range(2)) == 0
    assert json.loads((place / "numbers.json").read_text())["missing_views"] == 0


def test_an_unreadable_image_ends_all_processes_in_one_line(place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "data" / "train" / "class02" / "7.png").write_bytes(b"no image")
    said = started(f"{TEACH} --stream on --workers 0 --out store --devices 2")
    assert said.returncode == 2
    assert "class02/7.png" in said.stderr and said.stderr.count("\n") == 1, said.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{TEACH} --nodes 2 --out s", "the address of the other nodes is unknown"),
        (f"{TEACH} --compile graphs --out s", "--compile graphs replays steps of training"),
        ("teach --teacher teacher --trust-code --data folder:data --out s", "--views is required"),
        ("teach --teacher teacher --data folder:data --out s --views auto", "give a number"),
        (f"{TEACH} --layers one,tow --out s", "has no layer 'tow'; did you mean two"),
        (
            f"{TEACH} --crop-scale 0.5,1 --out s",
            "--crop-scale is given, but --augment crop has none",
        ),
        (f"{TEACH} --top-k 3 --out s", "top_k is 3: expected 1 to 2"),
        (f"{TEACH} --out data", "data exists and holds no store"),
        (f"{TEACH.replace('--teacher teacher', '--teacher net.py:make')} --out s", "no trained"),
        ("distill --student net.py:make --store s --out run", "--store is given, but only"),
    ],
)
def test_what_is_wrong_is_one_line(place, command, line, message):
    said = command(line)
    assert said.status == 2 and message in said.err and said.err.count("\n") == 1
    assert not (place / "s").exists() and not (place / "run").exists()


def test_a_full_disk(place, command, monkeypatch):
    import errno

    from attention_transfer.store import arrays

    def full(*words):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(arrays.os, "pwrite", full)
    said = command(f"{TEACH} --out store")
    assert said.status == 1 and "the outputs so far are kept; make room" in said.err
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert command(f"{TEACH} --out store").status == 0


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes(place, command):
    """Each fills its share, and trains on its share."""
    assert command(f"{TEACH} --out one").status == 0
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def both(line):
        words = [sys.executable, "-m", "attention_transfer", *line.split(), "--devices", "2"]
        done = subprocess.run(
            words, cwd=place, capture_output=True, text=True, timeout=900, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    both(f"{TEACH} --out two")
    for name in ("logits.npy", "two.sum2.npy", "one.sum2.filled.npy"):
        one, other = (np.load(place / out / name) for out in ("one", "two"))
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=1e-5)
    line = (
        "distill --teacher teacher --trust-code --student net.py:make --data folder:data "
        f"--views 2 --epochs 2 --batch-size 8 --beta 1 {MACHINE}"
    )
    both(f"{line} --store live --out run-live")
    assert TeacherStore(place / "live").count_missing(torch.arange(IMAGES), range(2)) == 0
    both(f"{line.replace('--teacher teacher', '--teacher live')} --out run-kept")
    one, other = (
        (place / run / "student.safetensors").read_bytes() for run in ("run-live", "run-kept")
    )
    assert one == other
