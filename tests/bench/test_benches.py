"""The benches work at a tiny setting; no time is asserted."""

import sys
from dataclasses import replace
from functools import partial

import pytest
from rich.console import Console

from attention_transfer.bench import epoch, gradient, loss, step, teacher

QUIET = Console(quiet=True)


def test_step(tmp_path, small, same_process, read_rows):
    step.run(small, QUIET, tmp_path / "step.json")
    rows, _ = read_rows(tmp_path / "step.json", "step")
    assert list(rows) == ["authors", "student", "teacher", "at", "kd", "at+kd"]


def test_epoch(tmp_path, small, same_process, read_rows):
    epoch.run(small, QUIET, tmp_path / "epoch.json")
    rows, _ = read_rows(tmp_path / "epoch.json", "epoch")
    assert list(rows) == ["authors", "step", "epoch"]


def test_loss(tmp_path, small, read_rows):
    loss.run(small, QUIET, tmp_path / "loss.json")
    rows, _ = read_rows(tmp_path / "loss.json", "loss")
    names = [
        f"{candidate} {dtype} {memory_format}"
        for dtype in ("fp32", "bf16")
        for memory_format in ("contiguous", "channels_last")
        for candidate in ("authors", "ours", "floor")
    ]
    assert list(rows) == ["authors", *names[1:]]
    assert rows["floor bf16 contiguous"]["times_floor"] == 1


def test_teacher(tmp_path, small, same_process, read_rows):
    teacher.run(small, QUIET, tmp_path / "teacher.json")
    rows, _ = read_rows(tmp_path / "teacher.json", "teacher")
    eager = ["eager fp32", "eager fp32 channels_last", "eager bf16 channels_last"]
    assert list(rows) == ["authors", *eager]


def test_gradient(tmp_path, small, monkeypatch, read_rows):
    monkeypatch.setattr(gradient, "peak_memory", lambda make, device: 1.0)
    options = replace(small, student="nin-thin-no-bn", teacher="nin-thin-no-bn")
    gradient.run(options, QUIET, tmp_path / "gradient.json")
    rows, _ = read_rows(tmp_path / "gradient.json", "gradient")
    assert list(rows) == ["authors", *gradient.ROWS]
    assert rows["student"]["times_student"] == 1 and rows["at"]["peak_mib"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_memory_is_measured_in_a_process_of_its_own(small):
    options = replace(small, student="nin-thin-no-bn", teacher="nin-thin-no-bn", batch_size=16)
    alone, symmetry = (partial(gradient.make_step, options, m) for m in ("none", "symmetry"))
    assert 0 < gradient.peak_memory(alone, "cpu") < gradient.peak_memory(symmetry, "cpu")
