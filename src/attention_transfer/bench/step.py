"""`bench step`: AT+KD training steps against the authors' step and against their own lower bound.

The lower bound is the time of the student's training step plus that of the teacher's inference.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from .authors import authors_step
from .measure import interleave, report
from .options import BenchOptions
from .workload import measure_step, measure_teacher, random_batch, start


def run(options: BenchOptions, console: Console, json_file: Path | None) -> None:
    """Steps on a fixed batch; on a GPU also AT+KD as CUDA graphs."""
    runtime, fabric = start(options)
    batch = random_batch(options.batch_size, fabric.device)
    measure = partial(measure_step, options, runtime, fabric, batch)
    with authors_step(options, fabric.device) as authors:
        measures = {
            "authors": authors,
            "student": measure("none"),
            "teacher": measure_teacher(options, runtime, fabric, batch[0]),
            "at": measure("at"),
            "kd": measure("kd"),
            "at+kd": measure("at+kd"),
        }
        if runtime.device == "cuda" and runtime.compile:
            # `--compile auto` does not choose graphs, so they have a separate row.
            graphs = replace(runtime, graphs=True)
            measures["at+kd graphs"] = measure_step(options, graphs, fabric, batch, "at+kd")
        rows = interleave(measures, options.rounds)
    report("step", rows, options, runtime, console, json_file)
