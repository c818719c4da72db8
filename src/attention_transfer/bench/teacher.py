"""`bench teacher`: the teacher's inference, logits and tapped features, eager and compiled.

`authors` is their functional network in eager float32, in a process of its own; `compiled` is the
form that a run uses.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from .authors import AuthorsInference
from .in_subprocess import in_subprocess
from .measure import interleave, report
from .options import BenchOptions
from .workload import measure_teacher, random_batch, start


def run(options: BenchOptions, console: Console, json_file: Path | None) -> None:
    """Measures every form; `--compile off` leaves the compiled one out."""
    runtime, fabric = start(options)
    x, _ = random_batch(options.batch_size, fabric.device)
    # Each row has its own Fabric, because they differ in autocast.
    fp32 = replace(options, precision="fp32", compile="off")
    bf16 = replace(options, precision="bf16", compile="off")
    make = partial(AuthorsInference, options.teacher)
    with in_subprocess(make, options, fabric.device) as authors:
        contiguous = measure_teacher(fp32, *start(fp32), x, torch.contiguous_format)
        measures = {
            "authors": authors,
            "eager fp32": contiguous,
            "eager fp32 channels_last": measure_teacher(fp32, *start(fp32), x),
            "eager bf16 channels_last": measure_teacher(bf16, *start(bf16), x),
        }
        if runtime.compile:
            measures["compiled"] = measure_teacher(options, runtime, fabric, x)
        rows = interleave(measures, options.rounds)
    report("teacher", rows, options, runtime, console, json_file)
