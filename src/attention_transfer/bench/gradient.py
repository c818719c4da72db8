"""`bench gradient`: training steps of the methods on input gradients, and their memory.

The authors published no code for these methods: the row `authors` is the student alone in plain
PyTorch, eager and float32. `times_student` is the time of a step relative to our step without a
method. `peak_mib` is the additional memory at the peak of a step, each in a process of its own. The
methods without second derivatives are for comparison.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console

from ..apply.speed import resident_mib
from ..errors import RunError
from .measure import Measure, interleave, median_ratio, report, timed
from .options import BenchOptions
from .workload import create_network, make_transfer, random_batch, start, training_step

Step = Callable[[], object]
# The rows; `student` is the method none. Two of them are also measured compiled.
ROWS = ("student", "min-l2", "symmetry", "gradient", "at", "kd", "full")
COMPILED_TOO = ("student", "min-l2")


def run(options: BenchOptions, console: Console, json_file: Path | None) -> None:
    """Every method; `--compile off` leaves the compiled rows out."""
    steps: dict[str, Callable[[], Step]] = {"authors": partial(make_plain_step, options)}
    for name in ROWS:
        method = "none" if name == "student" else name
        steps[name] = partial(make_step, replace(options, compile="off"), method)
        if name in COMPILED_TOO and options.compile == "on":
            steps[f"{name} compiled"] = partial(make_step, options, method)
    run_steps("gradient", steps, options, console, json_file)


def run_steps(
    bench: str,
    steps: dict[str, Callable[[], Step]],
    options: BenchOptions,
    console: Console,
    json_file: Path | None,
) -> None:
    """Measures time and memory of the steps, by the names of their rows."""
    runtime, fabric = start(options)
    measures: dict[str, Measure] = {}
    for name, make in steps.items():
        measures[name] = timed(make(), options.steps, options.batch_size, fabric.device)
    rows = interleave(measures, options.rounds)
    student = next(row for row in rows if row.name == "student")
    for row in rows:
        row.extra["times_student"] = median_ratio(student, row)
        row.extra["peak_mib"] = peak_memory(steps[row.name], runtime.device)
    report(bench, rows, options, runtime, console, json_file)


def make_step(options: BenchOptions, method: str) -> Step:
    """The training step of a run on a fixed batch."""
    runtime, fabric = start(options)
    batch = random_batch(options.batch_size, fabric.device)
    return training_step(make_transfer(options, method, batch[0]), batch, runtime, fabric)


def make_plain_step(options: BenchOptions) -> Step:
    """The student's training step in plain PyTorch, eager and float32."""
    _, fabric = start(replace(options, precision="fp32"))
    x, y = random_batch(options.batch_size, fabric.device)
    x = x.contiguous()
    student = create_network(options.student, torch.contiguous_format).to(fabric.device)
    optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(student(x), y).backward()
        optimizer.step()

    return step


def peak_memory(make: Callable[[], Step], device: str) -> float:
    """Additional MiB at the peak of two steps, in a process of its own.

    Raises:
        RunError: on a system other than Linux without CUDA, and if the process dies.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_measure_memory, make, device == "cuda").result()
        except BrokenProcessPool:
            raise RunError("a process that measured memory died; its message is above") from None


def _measure_memory(make: Callable[[], Step], on_cuda: bool) -> float:
    step = make()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    before = _peak_mib(on_cuda)
    # The first step creates the optimiser's state; the second one runs with it.
    step()
    step()
    return _peak_mib(on_cuda) - before


def _peak_mib(on_cuda: bool) -> float:
    """The peak memory of this process so far."""
    if on_cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    # `getrusage` would include the memory of the parent process.
    try:
        return resident_mib("VmHWM")
    except OSError:
        raise RunError("memory can be measured on Linux and CUDA only") from None
