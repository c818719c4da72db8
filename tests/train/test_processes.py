"""Two processes train as one does: the same images a step, the same numbers."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch.distributed
from safetensors.torch import load_file
from small_runs import (
    FLAGS,
    STEPS_PER_EPOCH,
    TIMES,
    carry_out,
    rows,
    small,
    write_factory,
    write_folder,
)

from attention_transfer.data.images import make_generator
from attention_transfer.methods.registry import METHODS

pytestmark = [
    pytest.mark.usefixtures("quick_runs"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]
# One rank of two, as torchrun starts it; it sends itself a signal (0: none) after the first step.
ONE_OF_TWO = """
import os, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv.pop(1))
number = int(sys.argv.pop(1))
import pytest, small_runs
from attention_transfer.train import trainer
patch = pytest.MonkeyPatch()
patch.setattr(trainer, "SIGNAL_SYNC_STEPS", 2)
small_runs.stop_after(patch, 1, lambda loop: os.kill(os.getpid(), number))
sys.argv[0] = "attention-transfer"
from attention_transfer.cli import main
main()
"""


def free_port():
    """Below the ports that the system gives to other programs meanwhile (32768 and up)."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return port


def torchrun_environment(rank, port, count=2):
    """The variables that torchrun sets for one of `count` processes, and Fabric reads."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }


# A rank that carries out one run after another. Each line of the file is a folder, the options, the
# step after which this run gets a signal (0: none), and perhaps an image to damage instead.
RANK = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import pytest, small_runs
from attention_transfer.errors import UserError
from attention_transfer.train import trainer
from attention_transfer.train.signals import Interrupted
trainer.SIGNAL_SYNC_STEPS = 1
with small_runs._quick():
    for line in open(sys.argv[2]):
        out, options, step, *damaged = json.loads(line)
        action = small_runs.request_stop
        if damaged:
            action = lambda trainer: os.truncate(damaged[0], 60)
        with pytest.MonkeyPatch.context() as patch:
            small_runs.stop_after(patch, step, action)
            try:
                print(small_runs.carry_out(small_runs.small(**options), Path(out)))
            except (Interrupted, UserError) as error:
                print(type(error).__name__, error)
"""


def carry_out_on_ranks(count, jobs, folder, request):
    """Runs the jobs, as `RANK` reads them, on `count` ranks; what rank 0 said."""
    listed = folder / f"jobs-{count}-{len(list(folder.iterdir()))}"
    listed.write_text("".join(json.dumps(job) + "\n" for job in jobs))
    port, processes = free_port(), []
    for rank in range(count):
        words = [sys.executable, "-c", RANK, str(request.config.rootpath / "tests"), str(listed)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if count > 1:
            environment |= torchrun_environment(rank, port, count)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(words, cwd=folder, env=environment, **pipes))
    said = [process.communicate(timeout=900) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, said
    return said[0][0]


def assert_close_runs(run, alone):
    """Weights and losses agree within the rounding of float32."""
    ours, theirs = rows(run), rows(alone)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for row, expected in zip(ours, theirs, strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        assert row["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
        # Some terms are differences of nearly equal numbers.
        assert row["parts"] == pytest.approx(expected["parts"], rel=1e-4, abs=1e-6)
    one, other = (load_file(folder / "student.safetensors") for folder in (run, alone))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6)


def test_every_method_trains_alike_on_one_two_and_four_ranks(tmp_path, request):
    """Without --devices: the ranks are those that the launcher started.

    The network has no batch normalisation, whose statistics are those of each rank's share. A run
    that four ranks began and one ends is the same run, too.
    """
    plain = {"model": write_factory(tmp_path), "precision": "fp32", "lr": 0.05}
    carry_out(small(**plain, epochs=1), tmp_path / "teacher")
    options = {"at+kd": plain | {"method": "at+kd", "beta": "at=10"}}
    for name, method in METHODS.items():
        options[name] = plain | {"method": name}
        if "beta" in inspect.signature(method).parameters:
            options[name]["beta"] = 0.5
    for name, own in options.items():
        own["command"] = "distill"
        if any(METHODS[part].needs_teacher for part in name.split("+")):
            own |= {"teacher": str(tmp_path / "teacher"), "trust_code": True}
    alone = [(f"1 {name}", own, 0) for name, own in options.items()]
    carry_out_on_ranks(1, alone, tmp_path, request)
    for count in (2, 4):
        jobs = [(f"{count} {name}", own, 0) for name, own in options.items()]
        begun = ("begun", options["at+kd"], STEPS_PER_EPOCH + 1)
        said = carry_out_on_ranks(count, [*jobs, begun] if count == 4 else jobs, tmp_path, request)
        assert said.count("% error, loss") == len(options)
    state = torch.load(tmp_path / "begun" / "checkpoint.pt", weights_only=True)
    assert state["step"] == STEPS_PER_EPOCH + 1
    said = carry_out_on_ranks(1, [("begun", options["at+kd"], 0)], tmp_path, request)
    assert "warning: the run was started on 4 processes and continues on 1" in said
    for name in options:
        for count in (2, 4):
            assert_close_runs(tmp_path / f"{count} {name}", tmp_path / f"1 {name}")
    assert_close_runs(tmp_path / "begun", tmp_path / "1 at+kd")


def test_an_unreadable_image_in_mid_epoch_saves_the_state_of_all_ranks(tmp_path, request):
    images = write_folder(tmp_path / "images", classes=2, train=16, val=4)
    options = {
        "model": write_factory(tmp_path),
        "data": f"folder:{images}",
        "stream": "on",
        "workers": 0,
        "batch_size": 4,
        "precision": "fp32",
    }
    carry_out_on_ranks(2, [("alone", options, 0)], tmp_path, request)
    files = sorted((images / "train").rglob("*.png"))
    fourth_step = torch.randperm(len(files), generator=make_generator(0, 0))[12:16]
    torn = files[fourth_step[1]]  # rank 1 reads it
    content = torn.read_bytes()
    said = carry_out_on_ranks(2, [("run", options, 1, str(torn))], tmp_path, request)
    assert f"{torn}" in said and "the state is saved: run the command again to continue" in said
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 3
    torn.write_bytes(content)
    carry_out_on_ranks(2, [("run", options, 0)], tmp_path, request)
    assert rows(tmp_path / "run") == rows(tmp_path / "alone")


@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_rank_is_named_and_ends_the_others(tmp_path, dead):
    model = write_factory(tmp_path)
    line = f"train --model {model} {FLAGS} --epochs 9000 --devices 2 --out run"
    first = subprocess.Popen(
        [sys.executable, "-m", "attention_transfer", *line.split()],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    end = time.monotonic() + 300
    while not (tmp_path / "run" / "checkpoint.pt").is_file() and time.monotonic() < end:
        time.sleep(0.05)
    processes = [first.pid, int(subprocess.check_output(["pgrep", "-P", str(first.pid)]))]
    os.kill(processes[dead], signal.SIGKILL)
    said = first.communicate(timeout=300)[1]  # its end is that of both processes
    assert said.startswith(f"attention-transfer: rank {dead} (process {processes[dead]} on ")
    assert said.endswith(
        ") has died: every process stops; the last checkpoint is kept: "
        "run the same command again to continue\n"
    )
    assert said.count("\n") == 1
    assert first.returncode == (-signal.SIGKILL, 1)[dead]


def test_a_batch_that_the_ranks_cannot_share(tmp_path, request):
    options = {"model": write_factory(tmp_path), "batch_size": 33, "max_steps": 1}
    said = carry_out_on_ranks(2, [("run", options, 0)], tmp_path, request)
    expected = "warning: 2 processes share a batch of 33 images evenly, so 1 of each batch are left"
    assert expected in said


def test_two_processes_against_one(tmp_path):
    model = write_factory(
        tmp_path
    )  # without batch normalisation, whose statistics are each process's own
    words = f"train --model {model} {FLAGS} --precision fp32 --devices 2 --out two".split()
    command = [sys.executable, "-m", "attention_transfer", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    said = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("error, loss") == 1
    carry_out(small(model=model, precision="fp32"), tmp_path / "one")
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two) == 2
    for alone, shared in zip(one, two, strict=True):
        for key in ("train_loss", "val_loss", "train_accuracy", "val_accuracy"):
            assert shared[key] == pytest.approx(alone[key], abs=1e-3)
        assert shared["parts"] == pytest.approx(alone["parts"], abs=1e-3)
        assert (shared["epoch"], shared["step"], shared["lr"]) == (
            alone["epoch"],
            alone["step"],
            alone["lr"],
        )
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["epochs"] == 2


def test_a_signal_to_one_of_two_stops_both_within_the_epoch(tmp_path, request):
    model = write_factory(tmp_path, "make_normalised")

    def both(out, numbers=(0, 0)):
        port = free_port()
        line = f"train --model {model} {FLAGS} --precision fp32 --devices 2 --out {out}"
        processes = []
        for rank, number in enumerate(numbers):
            words = [
                sys.executable,
                "-c",
                ONE_OF_TWO,
                str(request.config.rootpath / "tests"),
                str(int(number)),
            ]
            environment = os.environ | torchrun_environment(rank, port) | {"OMP_NUM_THREADS": "1"}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(
                subprocess.Popen([*words, *line.split()], cwd=tmp_path, env=environment, **pipes)
            )
        said = [process.communicate(timeout=300) for process in processes]
        return [process.returncode for process in processes], said

    status, said = both("run", (0, signal.SIGTERM))
    assert status == [130, 130], said
    assert "the state is saved" in said[0][1]
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 2
    status, said = both("run")
    assert status == [0, 0] and "continuing run at step 2" in said[0][0], said
    assert both("alone")[0] == [0, 0]

    def numbers(out):
        return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(tmp_path / out)]

    assert numbers("run") == numbers("alone")
    one, other = (
        torch.load(tmp_path / out / "checkpoint.pt", weights_only=True) for out in ("run", "alone")
    )
    assert all(torch.equal(value, other["transfer"][key]) for key, value in one["transfer"].items())
