"""The effect of each speed measure: the AT+KD step of a run, and the same step without one of them.

    python bench/ablation.py --rounds 7 --steps 6 --json results/bench/ablation.json

Each row is a process of its own. `times_whole` is its speed relative to the whole step in the same
rounds. `--compile off` measures only the eager rows.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from harness import main
from rich.console import Console
from torch import Tensor

from attention_transfer.bench import BenchOptions
from attention_transfer.bench.authors import authors_step
from attention_transfer.bench.in_subprocess import in_subprocess
from attention_transfer.bench.measure import interleave, median_ratio, report
from attention_transfer.bench.workload import make_transfer, start
from attention_transfer.ops import batch_norm
from attention_transfer.runtime.options import RuntimeOptions
from attention_transfer.runtime.process import keep_malloc_arena, make_fabric
from attention_transfer.runtime.resolve import resolve_runtime
from attention_transfer.train.optimizer import make_optimizer
from attention_transfer.train.options import OptimizerOptions


@dataclass(frozen=True)
class Ablation:
    """One row: a step with everything except what is False."""

    name: str
    two_regions: bool = True
    own_batch_norm: bool = True
    keep_memory: bool = True
    channels_last: bool = True
    bf16: bool = True
    compiled: bool = True


WHOLE = "at+kd"
ABLATIONS = (
    Ablation(WHOLE),
    Ablation("one compiled region", two_regions=False),
    Ablation("PyTorch's batch normalisation", own_batch_norm=False),
    Ablation("freed memory given back", keep_memory=False),
    Ablation("contiguous", channels_last=False),
    Ablation("float32", bf16=False),
    Ablation("eager", compiled=False),
    Ablation("eager, contiguous, float32", channels_last=False, bf16=False, compiled=False),
)


def run(options: BenchOptions, console: Console, json_file: Path | None) -> None:
    runtime, fabric = start(options)
    with ExitStack() as processes:
        measures = {"authors": processes.enter_context(authors_step(options, fabric.device))}
        for ablation in ABLATIONS:
            if ablation.compiled and options.compile == "off":
                continue
            make = partial(AblationStep, ablation, options)
            process = in_subprocess(make, options, fabric.device)
            measures[ablation.name] = processes.enter_context(process)
        rows = interleave(measures, options.rounds)
    whole = next((row for row in rows if row.name == WHOLE), rows[-1])
    for row in rows:
        row.extra["times_whole"] = median_ratio(row, whole)
    report("ablation", rows, options, runtime, console, json_file)


class AblationStep:
    """One AT+KD step on batches (N, 3, H, W), without the measure that `ablation` disables."""

    def __init__(self, ablation: Ablation, options: BenchOptions):
        self.ablation, self.options = ablation, options

    def to(self, device: str) -> AblationStep:
        ablation = self.ablation
        chosen = RuntimeOptions(device=device, precision="bf16" if ablation.bf16 else "fp32")  # type: ignore[arg-type]
        self.fabric = make_fabric(chosen, resolve_runtime(chosen))
        if ablation.keep_memory:
            keep_malloc_arena()
        self.memory_format = torch.contiguous_format
        if ablation.channels_last:
            self.memory_format = torch.channels_last
        example = torch.rand(2, 3, 32, 32, device=device)
        transfer = make_transfer(self.options, WHOLE, example, memory_format=self.memory_format)
        if ablation.compiled and ablation.own_batch_norm and device == "cpu":
            batch_norm.use_in(transfer.student)
        if ablation.compiled and ablation.two_regions:
            transfer.compile(dynamic=False)
        elif ablation.compiled:
            transfer.forward = torch.compile(transfer.forward, dynamic=False)  # type: ignore[method-assign]
        optimizer = make_optimizer(OptimizerOptions(lr=0.01), transfer)
        self.transfer, self.optimizer = self.fabric.setup(transfer, optimizer)
        return self

    def __call__(self, x: Tensor, y: Tensor) -> None:
        x = x.to(memory_format=self.memory_format)
        self.fabric.backward(self.transfer(x, y, torch.tensor(0.5)).loss)
        self.optimizer.step()
        self.optimizer.zero_grad()


if __name__ == "__main__":
    main(__doc__, run)
