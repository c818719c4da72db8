"""AT and AT+KD steps by torchdistill, a library that has both, against ours on the same networks.

    pip install 'attention-transfer[peers]'
    python bench/peer_torchdistill.py --rounds 5 --steps 5 --json results/bench/peer.json

Theirs is their `DistillationBox` with their `ATLoss` (mode `code`), `KDLoss` and hooks, in a
process of its own; ours is the `Transfer`. `fp32` is eager on both sides, as in their examples;
`bf16` is eager under autocast in channels_last on both, the fastest form for a user of theirs in
plain PyTorch; `compiled` is the form of our runs. The row `authors` is AT+KD. `times_peer` is the
speed relative to theirs with the same method and precision; compiled rows are relative to the
faster of theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from harness import main
from rich.console import Console
from torch import Tensor

from attention_transfer.bench import BenchOptions
from attention_transfer.bench.authors import authors_step
from attention_transfer.bench.in_subprocess import in_subprocess
from attention_transfer.bench.measure import BenchRow, interleave, median_ratio, report
from attention_transfer.bench.workload import measure_step, random_batch, start
from attention_transfer.errors import UserError
from attention_transfer.models.create import create_model

PEER = "torchdistill"
METHODS = ("at", "at+kd")
LAYERS = ("group0", "group1", "group2")
BETA, ALPHA, TEMPERATURE, LR = 1e3, 0.9, 4.0, 0.01


class PeerStep:
    """One step of torchdistill on batches (N, 3, H, W) float32, on WRNs with random weights."""

    def __init__(self, student: str, teacher: str, method: str, bf16: bool = False):
        torch.manual_seed(0)
        self.student = create_model(student, 10).train()
        self.teacher = create_model(teacher, 10).eval()
        self.method, self.bf16 = method, bf16

    def to(self, device: str) -> PeerStep:
        from torchdistill.common.constant import def_logger
        from torchdistill.core.distillation import DistillationBox

        def_logger.setLevel(logging.WARNING)
        self.device, self.memory_format = torch.device(device), torch.contiguous_format
        if self.bf16:
            self.memory_format = torch.channels_last
        teacher = self.teacher.to(device).to(memory_format=self.memory_format)
        student = self.student.to(device).to(memory_format=self.memory_format)
        configuration = config(self.method)
        self.box = DistillationBox(teacher, student, {}, configuration, self.device, [], False, 1)
        return self

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.box.forward_process(x.to(memory_format=self.memory_format), y)
        self.box.post_forward_process(loss)
        return loss


def config(method: str) -> dict[str, Any]:
    """Their configuration of the authors' loss: β on the sum over pairs; KD weights 1 − α and α."""
    pairs = {}
    for layer in LAYERS:
        output = {"io": "output", "path": layer}
        pairs[layer] = {"teacher": output, "student": dict(output), "weight": 1}
    attention = {
        "criterion": {"key": "ATLoss", "kwargs": {"at_pairs": pairs, "mode": "code"}},
        "weight": BETA,
    }
    if method == "at+kd":
        terms = {"at": attention, "kd": _distillation()}
    else:
        terms = {"ce": _cross_entropy(), "at": attention}
    hooks = {"forward_hook": {"output": list(LAYERS)}, "forward_proc": "forward_batch_only"}
    return {
        "num_epochs": 1,
        "teacher": hooks | {"requires_grad": False},
        "student": dict(hooks),
        "optimizer": {"key": "SGD", "kwargs": {"lr": LR, "momentum": 0.9, "weight_decay": 5e-4}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }


def _cross_entropy() -> dict[str, Any]:
    inputs = {
        "input": {"is_from_teacher": False, "module_path": ".", "io": "output"},
        "target": {"uses_label": True},
    }
    return {
        "criterion": {"key": "CrossEntropyLoss", "kwargs": {}},
        "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": inputs},
        "weight": 1.0,
    }


def _distillation() -> dict[str, Any]:
    arguments: dict[str, Any] = {"temperature": TEMPERATURE, "alpha": 1 - ALPHA}
    for network in ("student", "teacher"):
        arguments |= {f"{network}_module_path": ".", f"{network}_module_io": "output"}
    return {"criterion": {"key": "KDLoss", "kwargs": arguments}, "weight": 1.0}


def run(options: BenchOptions, console: Console, json_file: Path | None) -> None:
    """Theirs and ours; `--compile off` leaves the compiled rows out."""
    if find_spec(PEER) is None:
        raise UserError(
            f"this script needs {PEER}, which is not installed: "
            "pip install 'attention-transfer[peers]'"
        )
    runtime, fabric = start(options)
    kinds = {"fp32": replace(options, precision="fp32", compile="off")}
    kinds["bf16"] = replace(options, precision="bf16", compile="off")
    if options.compile == "on":
        kinds["compiled"] = options
    batch = random_batch(options.batch_size, fabric.device)
    with ExitStack() as stack:
        measures = {"authors": stack.enter_context(authors_step(options, fabric.device))}
        for method in METHODS:
            for kind in ("fp32", "bf16"):
                make = partial(
                    PeerStep, options.student, options.teacher, method, bf16=kind == "bf16"
                )
                process = in_subprocess(make, options, fabric.device)
                measures[f"{PEER} {method} {kind}"] = stack.enter_context(process)
        for method in METHODS:
            for kind, chosen in kinds.items():
                step = measure_step(chosen, *start(chosen), batch, method)
                measures[f"ours {method} {kind}"] = step
        rows = interleave(measures, options.rounds)
    for row in rows:
        row.extra["times_peer"] = median_ratio(row, peer_of(row.name, rows))
    report("peer", rows, options, runtime, console, json_file)


def peer_of(name: str, rows: Sequence[BenchRow]) -> BenchRow:
    """The row of theirs with the same method and precision, or the faster one if compiled."""
    if name == "authors":
        name = "authors at+kd fp32"
    _, method, kind = name.split()
    theirs = {row.name: row for row in rows if row.name.startswith(f"{PEER} {method} ")}
    if kind != "compiled":
        return theirs[f"{PEER} {method} {kind}"]
    # Which of the two is faster differs between machines.
    return max(theirs.values(), key=lambda row: row.median)


if __name__ == "__main__":
    main(__doc__, run)
