"""A run that fails says so in one line, and leaves the last good checkpoint as it was."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import (
    FLAGS,
    STEPS_PER_EPOCH,
    carry_out,
    contents,
    distilled,
    request_stop,
    rows,
    small,
    stop_after,
    write_factory,
)

from attention_transfer.errors import RunError
from attention_transfer.train import trainer

pytestmark = pytest.mark.usefixtures("quick_runs")
TRAIN = f"train --model wrn-10-1 {FLAGS} --out run"


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(state, stream):
    stream.write(b"half")
    full_disk()


def from_call(number, original, instead):
    """`original`, and from its so-manyth call on `instead`."""
    calls = []

    def function(*args, **kwargs):
        calls.append(args)
        return (instead if len(calls) >= number else original)(*args, **kwargs)

    return function


def poison(monkeypatch, step):
    """The images of one step are not numbers, as if the network had overflowed there."""
    original = trainer.Trainer.train_step

    def watched(self, batch, view):
        if self.step + 1 == step:
            batch = batch._replace(images=batch.images * torch.nan)
        original(self, batch, view)

    monkeypatch.setattr(trainer.Trainer, "train_step", watched)


@pytest.mark.parametrize(
    ("module", "name", "instead"),
    [(os, "fsync", full_disk), (torch, "save", half_written), (torch, "save", full_disk)],
)
def test_a_full_disk(teacher_run, command, tmp_path, monkeypatch, module, name, instead):
    kept = []

    def fail(*args):
        kept.append(contents(tmp_path / "run"))
        instead(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, from_call(2, getattr(module, name), fail))
        said = command(TRAIN)
    assert said.status == 1
    assert said.err.startswith(
        "attention-transfer: cannot write run/checkpoint.pt: No space left on device; the last"
    )
    assert said.err.count("\n") == 1
    left = contents(tmp_path / "run")
    assert left["checkpoint.pt"] == kept[0]["checkpoint.pt"]
    assert set(left) == {"config.yaml", "environment.json", "metrics.jsonl", "checkpoint.pt"}

    said = command(TRAIN)
    assert (said.status, said.err) == (0, "")
    assert f"continuing run at step {STEPS_PER_EPOCH}" in said.out
    assert rows(tmp_path / "run") == rows(teacher_run)
    same = [(f / "student.safetensors").read_bytes() for f in (tmp_path / "run", teacher_run)]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    "place", ["safetensors.torch.save", "json.dumps", "numpy.savez_compressed"]
)
def test_a_full_disk_at_another_file(teacher_run, command, tmp_path, monkeypatch, place):
    with monkeypatch.context() as patch:
        patch.setattr(place, full_disk)
        said = command(TRAIN)
    assert said.status == 1
    assert "No space left on device" in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not [name for name in contents(tmp_path) if name.endswith(".partial")]
    assert command(TRAIN).status == 0
    assert rows(tmp_path / "run") == rows(teacher_run)


@pytest.mark.parametrize("step", [STEPS_PER_EPOCH + 1, 2 * STEPS_PER_EPOCH])
def test_a_loss_that_is_not_finite(command, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        stop_after(patch, STEPS_PER_EPOCH, request_stop)
        assert command(TRAIN).status == 130
    good = contents(tmp_path / "run")
    poison(monkeypatch, step)
    for _ in range(2):  # and again: it does not pass for a finished run
        said = command(TRAIN)
        assert said.status == 1
        assert (
            f"the loss is not finite: first at step {step} in ce; the last good checkpoint is kept"
            in said.err
        )
        assert said.err.count("\n") == 1
        assert contents(tmp_path / "run") == good


def test_every_part_that_is_not_finite_is_named(teacher_run, tmp_path, monkeypatch):
    poison(monkeypatch, 3)
    with pytest.raises(RunError, match=r"step 3 in ce, at \(pair group0 ← group0\), kd;"):
        carry_out(distilled(teacher_run), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_ctrl_c_does_not_save_what_is_not_finite(tmp_path, monkeypatch):
    poison(monkeypatch, 2)
    stop_after(monkeypatch, 3, request_stop)
    with pytest.raises(RunError, match="first at step 2 in ce"):
        carry_out(small(), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_learning_rate_that_diverges(command, tmp_path):
    for _ in range(2):
        said = command(f"{TRAIN} --lr 1e30")
        assert said.status == 1
        assert "the loss is not finite: first at step 2 in ce" in said.err
        assert said.err.count("\n") == 1
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("factor", [float("nan"), 1e15])
def test_a_last_step_that_diverges(tmp_path, monkeypatch, factor):
    """The loss of the last step is finite, but not the weights, or their outputs."""

    def spoil(trainer):
        with torch.no_grad():
            for parameter in trainer.module.trainable_parameters():
                parameter.mul_(factor)

    stop_after(monkeypatch, 2 * STEPS_PER_EPOCH, spoil)
    with pytest.raises(
        RunError,
        match=f"not finite after step {2 * STEPS_PER_EPOCH}; the last good checkpoint is kept",
    ):
        carry_out(small(precision="fp32"), tmp_path / "run")
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == STEPS_PER_EPOCH
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_folder_that_is_removed_meanwhile(command, tmp_path, monkeypatch):
    stop_after(monkeypatch, STEPS_PER_EPOCH + 1, lambda _: shutil.rmtree(tmp_path / "run"))
    said = command(TRAIN)
    assert said.status == 1
    assert said.err.startswith("attention-transfer: run was removed or replaced while the run was")
    assert said.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def allocate_with_torch(*args):
    torch.empty(1 << 60)


def allocate_with_python(*args):
    bytearray(1 << 60)


@pytest.mark.parametrize("allocate", [allocate_with_torch, allocate_with_python])
def test_memory_exhausted_within_a_step(command, tmp_path, monkeypatch, allocate):
    """The state is that before the step: its batch statistics, sums and random numbers, too."""
    line = TRAIN.replace("wrn-10-1", write_factory(tmp_path, "make_normalised"))
    line += " --accumulate 2 --mixup 0.2"
    assert command(line.replace("--out run", "--out alone")).status == 0
    original = trainer.Trainer._backward
    calls = []

    def watched(self, *args):
        original(self, *args)
        if calls.append(args) or len(calls) == 2 * (STEPS_PER_EPOCH + 1) + 2:  # of micro-batches
            allocate()

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_backward", watched)
        said = command(line)
    assert said.status == 1
    assert said.err == (
        f"attention-transfer: memory is exhausted in step {STEPS_PER_EPOCH + 2}: use a smaller "
        "--batch-size, or split each batch with --accumulate, in another --out; or free some "
        "memory, and run the command again; the state is saved\n"
    )
    assert f"at step {STEPS_PER_EPOCH + 1} of" in command(line).out
    assert rows(tmp_path / "run") == rows(tmp_path / "alone")
    same = [(tmp_path / run / "student.safetensors").read_bytes() for run in ("run", "alone")]
    assert same[0] == same[1]


def test_memory_exhausted_within_an_update(teacher_run, command, tmp_path, monkeypatch):
    """Some weights may be new and others not: such a state is not saved."""

    def exhaust(loop):
        loop.wrapped_optimizer.step = allocate_with_torch

    with monkeypatch.context() as patch:
        stop_after(patch, STEPS_PER_EPOCH + 1, exhaust)
        said = command(TRAIN)
    assert said.status == 1
    assert "the last checkpoint is kept" in said.err
    assert f"at step {STEPS_PER_EPOCH} of" in command(TRAIN).out
    assert rows(tmp_path / "run") == rows(teacher_run)


def test_memory_exhausted_while_images_are_read(command, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2, lambda loop: patch.setattr(loop, "_batch", allocate_with_torch))
        said = command(TRAIN)
    assert said.status == 1
    assert "memory is exhausted while images are read: use a smaller --batch-size" in said.err
    assert "the state is saved: run the command again to continue" in said.err
    assert "at step 2 of" in command(TRAIN).out


def test_a_teacher_whose_maps_overflow(teacher_run, command, tmp_path):
    """Distillation of logits needs no map: the run ends, its report lacks them."""
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_run, teacher)
    (teacher / "summary.json").unlink()  # it has the hash of the weights
    file = teacher / "student.safetensors"
    with safe_open(file, framework="pt") as content:
        about = content.metadata()
    weights = load_file(file)
    weights["conv0.weight"] *= 1e21
    save_file(weights, file, about)
    said = carry_out(distilled(teacher, "kd"), tmp_path / "run")
    assert "warning: the report has no attention maps: group0: features" in said
    assert (tmp_path / "run" / "summary.json").is_file()
    answer = command(f"maps {teacher} --images digits --out maps.png")
    assert answer.status == 2 and f"{teacher}: group0: features: |A|^p overflows" in answer.err
