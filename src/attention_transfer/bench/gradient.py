"""`bench gradient`: what the methods on input gradients cost, beside the student's step alone.

The authors published no code for these methods. The yardsticks are what anybody would write: the student alone in eager
float32 (the row `authors`), and PyTorch's own double backward in it (`… plain`). `times_student` is the time of a step
over that of ours with no method; `peak_mib` is the memory of the process at the height of a step, beyond what it held
before, each in a process of its own. The methods without second derivatives are there to compare with.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from rich.console import Console
from torch import Tensor, nn

from ..errors import RunError
from ..methods import create_methods
from ..models import create_model
from ..runtime.process import make_fabric, set_up_process
from ..runtime.resolve import resolve_runtime
from ..train.optimizer import make_optimizer
from ..transfer import Transfer
from .measure import Timed, interleave, report
from .speed import Settings, about, rate, recipe_of

Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One row: a method, how it is differentiated, and whether it is compiled.

    `plain`: without this package; with `tuned` that in channels_last and, where the machine is fast at it, bfloat16.
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


def bench_gradient(settings: Settings, console: Console, file: Path | None) -> None:
    """Steps of every case, interleaved; `--compile off` leaves the compiled ones out."""
    cases = [c for c in CASES if not c.compiled or settings.compile == "on"]
    recipe = recipe_of(settings, "none")
    runtime = set_up_process(resolve_runtime(recipe))
    fabric = make_fabric(recipe, runtime)
    torch.compiler.reset()
    timed: dict[str, Timed] = {}
    for case in cases:
        timed[case.name] = rate(make_step(case, settings), settings, fabric)
        timed[case.name]()
    rows = interleave(timed, settings.rounds)
    alone = next(r for r in rows if r.name == "student")
    for row, case in zip(rows, cases, strict=True):
        slower = [a / b for a, b in zip(alone.rates, row.rates, strict=True)]
        row.more = {"times_student": statistics.median(slower)}
        row.more["peak_mib"] = peak_memory(case, settings)
    report("gradient", rows, about(settings, runtime), console, file)


def make_step(case: Case, settings: Settings) -> Step:
    """One training step of a case on a batch that lies ready."""
    recipe = replace(recipe_of(settings, case.method), compile="on" if case.compiled else "off")
    if case.plain and not case.tuned:
        recipe = replace(recipe, precision="fp32")
    fabric = make_fabric(recipe, set_up_process(resolve_runtime(recipe)))
    torch.manual_seed(1)
    x = torch.rand(settings.batch_size, 3, 32, 32, device=fabric.device)
    y = torch.randint(10, (settings.batch_size,), device=fabric.device)
    student, teacher = (
        create_model(name, 10).to(fabric.device) for name in (settings.student, settings.teacher)
    )
    if case.tuned or not case.plain:
        x = x.to(memory_format=torch.channels_last)
        student, teacher = (m.to(memory_format=torch.channels_last) for m in (student, teacher))
    if case.plain:
        return plain_step(case.method, student, teacher.eval(), x, y, fabric)
    methods = create_methods(recipe)
    transfer = Transfer(student, teacher, methods, example=x[:2])
    if case.compiled:
        transfer.compile(dynamic=False)
    wrapped, optimizer = fabric.setup(transfer, make_optimizer(recipe, transfer))

    def step() -> None:
        fabric.backward(wrapped(x, y, torch.tensor(0.5)).loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_step(
    method: str, student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, fabric: Fabric
) -> Step:
    """The same step in plain PyTorch, by its own double backward; β is 1. Of Fabric it uses the autocast."""
    optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)

    def j(model: nn.Module, x: Tensor, y: Tensor, graph: bool) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        logits = model(x).float()
        return logits, torch.autograd.grad(
            F.cross_entropy(logits, y, reduction="sum"), x, create_graph=graph
        )[0]

    def loss() -> Tensor:
        if method == "none":
            return F.cross_entropy(student(x), y)
        if method == "symmetry":
            logits, mine = j(student, torch.cat([x, x.flip(3)]), torch.cat([y, y]), True)
            logits, d = logits[: len(x)], mine[: len(x)] - mine[len(x) :].flip(3)
        else:
            logits, d = j(student, x, y, True)
            if method == "gradient":
                d = d - j(teacher, x, y, False)[1]
        return F.cross_entropy(logits, y) + d.flatten(1).square().sum(1).mean() / 2

    def step() -> None:
        optimizer.zero_grad()
        with fabric.autocast():
            value = loss()
        value.backward()
        optimizer.step()

    return step


def peak_memory(case: Case, settings: Settings) -> float:
    """MiB that a few steps take at their height, beyond what the process held when it stood ready for them."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_measure_memory, args=(case, settings, there))
    process.start()
    there.close()
    try:
        return float(here.recv())
    except EOFError:
        raise RunError(
            f"the process that measured the memory of {case.name} died; its message is above"
        ) from None
    finally:
        process.join()


def _measure_memory(case: Case, settings: Settings, pipe: Any) -> None:
    step = make_step(case, settings)
    if torch.cuda.is_available() and settings.device != "cpu":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        step()
        pipe.send((torch.cuda.max_memory_allocated() - held) / 2**20)
        return
    before = _high_water()
    step()
    step()
    pipe.send(_high_water() - before)


def _high_water() -> float:
    """The most memory that this process has held, in MiB; `getrusage` would count its parent's in."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    except (OSError, StopIteration):
        raise RunError("memory is measured on Linux and CUDA only") from None
