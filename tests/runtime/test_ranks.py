"""How many processes a run has, and how they wait for one another."""

from __future__ import annotations

import os
import socket

import pytest
import torch

from attention_transfer.errors import RunError, UserError
from attention_transfer.runtime import ranks
from attention_transfer.runtime.options import RuntimeOptions
from attention_transfer.runtime.ranks import global_rank, resolve_processes

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in (*NAMES, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def launch(monkeypatch, rank=1, local_rank=1, world_size=4, local_world_size=2):
    """As torchrun does."""
    values = (rank, local_rank, world_size, local_world_size)
    for name, value in zip(NAMES, values, strict=False):
        monkeypatch.setenv(name, str(value))


def settled(**options):
    return resolve_processes(RuntimeOptions(**options))


def test_without_a_launcher_the_options_say():
    assert settled() == (1, 1)
    assert settled(devices=2) == (2, 1)
    assert global_rank() == 0


def test_a_launcher_says_how_many(monkeypatch):
    launch(monkeypatch, rank=3)
    assert settled() == settled(devices=2, nodes=2) == (2, 2)
    assert global_rank() == 3


def test_srun_says_how_many(monkeypatch):
    slurm = {"NTASKS": 4, "NNODES": 2, "PROCID": 3, "LOCALID": 1, "NODELIST": "a", "JOB_ID": 1}
    slurm |= {"JOB_NAME": "train", "NTASKS_PER_NODE": 2}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setattr(os, "environ", os.environ.copy())  # which the translation writes to
    assert settled() == (2, 2)
    assert global_rank() == 3


@pytest.mark.parametrize("options", [{"devices": 4}, {"devices": 3}, {"devices": 2, "nodes": 3}])
def test_options_that_contradict_the_launcher(monkeypatch, options):
    launch(monkeypatch)
    with pytest.raises(UserError, match="the launcher started 2 processes on each of 2 nodes"):
        settled(**options)


def test_more_devices_than_there_are(monkeypatch):
    with pytest.raises(UserError, match=r"--devices 999999: this machine has \d+ cores"):
        settled(devices=999999)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--devices 2: this machine has 1 GPUs"):
        settled(devices=2)
    launch(monkeypatch)
    with pytest.raises(UserError, match="--devices 2: this machine has 1 GPUs"):
        settled()
    assert settled(device="cpu") == (2, 2)


def test_nodes_that_nothing_has_started():
    with pytest.raises(UserError, match=r"--nodes 2: the address .* is unknown .*: start torchrun"):
        settled(nodes=2)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "rank 0 of 2 waited 1 s for rank 1: start as many processes as"),
        (1, r"rank 1 of 2 waited 1 s for rank 0 at 127\.0\.0\.1:\d+: start rank 0, or check"),
    ],
)
def test_a_rank_that_does_not_come(monkeypatch, rank, message):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch(monkeypatch, rank, rank, 2, 2)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(ranks, "MEET_SECONDS", 1.0)
    with pytest.raises(RunError, match=message):
        ranks.join(RuntimeOptions(devices=2))
