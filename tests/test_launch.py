"""Seeds one after another and at the same time."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from small_runs import FLAGS, Command, rows, write_factory

from attention_transfer.run_folder import RunFolder

LINE = f"train --seed 3 --seeds 2 --max-steps 6 {FLAGS} --precision fp32"
# Diverges for one seed; a network's seed is set before it is made.
PICKY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.conv, self.fc, self.factor = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 10), factor

    def forward(self, x):
        x = self.fc(self.conv(x).relu().mean((2, 3)))
        return x * self.factor if self.training and torch.is_grad_enabled() else x

def make(num_classes):
    return Net(float("inf") if torch.initial_seed() == 3 else 1.0)
"""


@pytest.fixture
def _one_thread(monkeypatch):
    """The order of sums depends on the number of threads."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
def test_jobs_give_the_same_runs(command: Command, tmp_path):
    line = f"{LINE} --model {write_factory(tmp_path)}"
    assert command(f"{line} --out one").status == 0
    said = command(f"{line} --out both --jobs 2")
    assert (said.status, said.err) == (0, "")
    assert {f.name for f in (tmp_path / "both").iterdir()} == {"seed-3", "seed-4", "report.html"}
    for seed in ("seed-3", "seed-4"):
        one, both = tmp_path / "one" / seed, tmp_path / "both" / seed
        assert rows(one) == rows(both)
        assert (one / "student.safetensors").read_bytes() == (
            both / "student.safetensors"
        ).read_bytes()
        assert (both / "report.html").is_file()
    assert command(f"{line} --out both").out.count("is finished") == 2


def test_each_line_names_its_run(tmp_path):
    line = f"{LINE} --model {write_factory(tmp_path)} --out run --jobs 2"
    said = subprocess.run(
        [sys.executable, "-m", "attention_transfer", *shlex.split(line)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    *lines, report, weights, following = said.stdout.splitlines()
    assert lines
    assert all(line.startswith(("seed-3 | ", "seed-4 | ")) for line in lines)
    assert report == "curves, costs and attention maps: run/report.html"
    assert weights == "weights: run/seed-*/student.safetensors"
    assert following.startswith("next: attention-transfer distill --teacher run/seed-3 ")
    assert sum("% error" in line for line in lines) == 2
    for epoch in ("epoch 1/2, step 4: train loss ", "epoch 2/2, step 6: train loss "):
        assert sum(epoch in line for line in lines) == 2


def test_what_fails_is_named_and_the_rest_is_kept(command: Command, tmp_path):
    (tmp_path / "picky.py").write_text(PICKY)
    said = command(f"{LINE} --model picky.py:make --out run --jobs 2")
    assert said.status == 2  # found by the dry step, before training
    assert "run/seed-3: the term ce is not finite" in said.err
    assert said.err.count("\n") == 1
    assert (tmp_path / "run" / "seed-4" / "summary.json").is_file()


def modified(file):
    """When a file was written; 0 in the moment in which its successor takes its name."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize(
    ("number", "whole_group"), [(signal.SIGTERM, True), (signal.SIGINT, False)]
)
def test_stopped_it_saves_and_goes_on(tmp_path, number, whole_group):
    """As by `timeout` or a scheduler; as by a stop button."""
    model = write_factory(tmp_path)
    line = f"{LINE} --model {model} --epochs 9000 --max-steps 36000 --out run --jobs 2"
    checkpoints = [tmp_path / "run" / seed / "checkpoint.pt" for seed in ("seed-3", "seed-4")]

    def stopped_once_both(progressed):
        """Its standard output, after a signal."""
        process = subprocess.Popen(
            [sys.executable, "-m", "attention_transfer", *shlex.split(line)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        end = time.monotonic() + 300
        while (
            not all(map(progressed, checkpoints))
            and time.monotonic() < end
            and process.poll() is None
        ):
            time.sleep(0.02)
        (os.killpg if whole_group else os.kill)(process.pid, number)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 130, err
        assert (
            err == "attention-transfer: interrupted: the state is saved; "
            "run the same command again to continue\n"
        )
        return out

    stopped_once_both(lambda checkpoint: checkpoint.is_file())
    steps = {c: torch.load(c, weights_only=True)["step"] for c in checkpoints}
    before = {c: modified(c) for c in checkpoints}
    out = stopped_once_both(lambda checkpoint: modified(checkpoint) > before[checkpoint])
    for checkpoint, step in steps.items():
        name = checkpoint.parent.name
        assert f"{name} | continuing run/{name} at step {step} of 36000" in out
        assert torch.load(checkpoint, weights_only=True)["step"] > step > 0
        assert len(rows(checkpoint.parent)) >= step // 4


def start_two_long_runs(folder, **streams):
    """The process that started them, and their folders, once both have a checkpoint."""
    line = f"{LINE} --model {write_factory(folder)} --epochs 9000 --max-steps 36000"
    process = subprocess.Popen(
        [sys.executable, "-m", "attention_transfer", *shlex.split(f"{line} --out run --jobs 2")],
        cwd=folder,
        text=True,
        **streams,
    )
    runs = [folder / "run" / seed for seed in ("seed-3", "seed-4")]
    end = time.monotonic() + 300
    while not all((run / "checkpoint.pt").is_file() for run in runs) and time.monotonic() < end:
        time.sleep(0.02)
    return process, runs


def test_a_run_that_somebody_stopped_is_not_a_success(tmp_path):
    """The lock names the process of a run, and a person may stop that one."""
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process, runs = start_two_long_runs(tmp_path, **streams)
    for run in runs:
        os.kill(json.loads((run / ".lock").read_text())["process"], signal.SIGTERM)
    err = process.communicate(timeout=300)[1]
    assert process.returncode == 130, err
    assert err.startswith("attention-transfer: interrupted: the state is saved")


def test_jobs_end_with_the_process_that_started_them(tmp_path):
    """Killed, it can tell them nothing; they save their state and leave the folders free."""
    process, runs = start_two_long_runs(tmp_path, stdout=subprocess.PIPE)
    process.kill()
    said = process.communicate(timeout=300)[0]  # its end is that of the last job
    assert said.count("stopping after this step; the state is saved first") == 2
    for run in runs:
        with RunFolder(run).lock:
            pass


def test_jobs_of_a_process_that_torchrun_started(command: Command, tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    said = command(f"{LINE} --model wrn-10-1 --out run --jobs 2")
    assert said.status == 2
    assert "--jobs is 2: a run of several processes uses the whole machine" in said.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--jobs 0", "jobs is 0: expected a whole number ≥ 1"),
        ("--jobs 2 --devices 2", "expected 1"),
    ],
)
def test_invalid_jobs(command: Command, words, expected):
    said = command(f"{LINE} --model wrn-10-1 --out run {words}")
    assert said.status == 2
    assert expected in said.err
