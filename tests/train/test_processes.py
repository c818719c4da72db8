"""Two processes train as one does: the same images a step, the same numbers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch.distributed
from small_runs import FLAGS, TIMES, carry_out, rows, small, write_factory

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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun_environment(rank, port):
    """The variables that torchrun sets for one of two processes, and Fabric reads."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }


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
