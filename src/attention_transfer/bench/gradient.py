"""`bench gradient`: steps of the methods on input gradients against the student's step alone.

The authors published no code for these methods. The baselines are plain PyTorch: the student alone
in eager float32 (the row `authors`), and double backward in it (`… plain`). `times_student` is the
time of a step over that of ours with no method. `peak_mib` is the peak memory of a step beyond what
the process held before, each in a process of its own. The methods without second derivatives are
for comparison.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from rich.console import Console
from torch import Tensor, nn

from ..errors import RunError
from .measure import Measure, interleave, median_ratio, report, timed
from .options import BenchOptions
from .workload import Batch, create_network, make_transfer, random_batch, start, training_step

Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One row.

    `plain`: PyTorch's double backward without this package, in eager float32; `tuned`: the same in
    channels_last and, if the machine is fast at it, in bfloat16.
    """

    name: str
    method: str
    compiled: bool = False
    plain: bool = False
    tuned: bool = False


CASES = (
    Case("authors", "none", plain=True),
    Case("student", "none"),
    Case("student compiled", "none", compiled=True),
    Case("min-l2 plain", "min-l2", plain=True),
    Case("min-l2 plain tuned", "min-l2", plain=True, tuned=True),
    Case("min-l2", "min-l2"),
    Case("min-l2 compiled", "min-l2", compiled=True),
    Case("symmetry plain", "symmetry", plain=True),
    Case("symmetry plain tuned", "symmetry", plain=True, tuned=True),
    Case("symmetry", "symmetry"),
    Case("gradient plain", "gradient", plain=True),
    Case("gradient plain tuned", "gradient", plain=True, tuned=True),
    Case("gradient", "gradient"),
    Case("at", "at"),
    Case("kd", "kd"),
    Case("full", "full"),
)


def run(options: BenchOptions, console: Console, json_file: Path | None) -> None:
    """Steps of every case; `--compile off` leaves the compiled ones out."""
    runtime, fabric = start(options)
    cases = [case for case in CASES if options.compile == "on" or not case.compiled]
    measures: dict[str, Measure] = {}
    for case in cases:
        step = make_step(case, options)
        measures[case.name] = timed(step, options.steps, options.batch_size, fabric.device)
    rows = interleave(measures, options.rounds)
    student = next(row for row in rows if row.name == "student")
    for row, case in zip(rows, cases, strict=True):
        row.extra["times_student"] = median_ratio(student, row)
        row.extra["peak_mib"] = peak_memory(case, options)
    report("gradient", rows, options, runtime, console, json_file)


def make_step(case: Case, options: BenchOptions) -> Step:
    """One training step of a case on a batch that lies ready."""
    if not case.compiled:
        options = replace(options, compile="off")
    memory_format = torch.channels_last
    if case.plain and not case.tuned:
        options = replace(options, precision="fp32")
        memory_format = torch.contiguous_format
    runtime, fabric = start(options)
    x, y = random_batch(options.batch_size, fabric.device)
    if not case.plain:
        return training_step(make_transfer(options, case.method, x), (x, y), runtime, fabric)
    student = create_network(options.student, memory_format).to(fabric.device)
    teacher = create_network(options.teacher, memory_format).to(fabric.device).eval()
    x = x.to(memory_format=memory_format)
    return plain_step(case.method, student, teacher, (x, y), fabric)


def plain_step(
    method: str, student: nn.Module, teacher: nn.Module, batch: Batch, fabric: Fabric
) -> Step:
    """The same step by PyTorch's double backward, with β = 1; only the autocast is Fabric's."""
    x, y = batch
    optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)

    def input_gradient(
        model: nn.Module, x: Tensor, y: Tensor, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        logits = model(x).float()
        loss = F.cross_entropy(logits, y, reduction="sum")
        return logits, torch.autograd.grad(loss, x, create_graph=create_graph)[0]

    def loss() -> Tensor:
        if method == "none":
            return F.cross_entropy(student(x), y)
        if method == "symmetry":
            both, labels = torch.cat([x, x.flip(3)]), torch.cat([y, y])
            logits, j = input_gradient(student, both, labels, True)
            logits, difference = logits[: len(x)], j[: len(x)] - j[len(x) :].flip(3)
        else:
            logits, difference = input_gradient(student, x, y, True)
            if method == "gradient":
                difference = difference - input_gradient(teacher, x, y, False)[1]
        return F.cross_entropy(logits, y) + difference.flatten(1).square().sum(1).mean() / 2

    def step() -> None:
        optimizer.zero_grad()
        with fabric.autocast():
            value = loss()
        value.backward()
        optimizer.step()

    return step


def peak_memory(case: Case, options: BenchOptions) -> float:
    """MiB at the peak of two steps, beyond what the process held before them.

    Raises:
        RunError: on a system other than Linux without CUDA, and if the process dies.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_measure_memory, case, options).result()
        except BrokenProcessPool:
            raise RunError(
                f"the process that measured the memory of {case.name} died; its message is above"
            ) from None


def _measure_memory(case: Case, options: BenchOptions) -> float:
    step = make_step(case, options)
    on_cuda = torch.cuda.is_available() and options.device != "cpu"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    before = _peak_mib(on_cuda)
    step()
    step()
    return _peak_mib(on_cuda) - before


def _peak_mib(on_cuda: bool) -> float:
    """The most memory that this process has held so far."""
    if on_cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    # Not by `getrusage`, which counts the memory of the parent process too.
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        raise RunError("memory can be measured on Linux and CUDA only") from None
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 2**10
