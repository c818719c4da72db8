"""`bench loss`: the activation loss alone, forward and backward, on the shapes of a ResNet's four stages.

`authors` is their formula in eager PyTorch; `floor` is what memory alone asks for: student and teacher read once
forward, the student read and its gradient written once backward. A row's name says dtype and memory format.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from ..maps import at_loss
from ..runtime.process import make_fabric, set_up_process
from ..runtime.resolve import resolve_runtime
from .measure import Timed, interleave, report
from .speed import Settings, about, recipe_of

SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7))
BATCH = 64
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Features = list[Tensor]


def bench_loss(settings: Settings, console: Console, file: Path | None) -> None:
    """Every way in every dtype and memory format, interleaved; images/s of all four pairs together."""
    recipe = recipe_of(settings, "none")
    runtime = set_up_process(resolve_runtime(recipe))
    fabric = make_fabric(recipe, runtime)
    torch.compiler.reset()
    batch = min(BATCH, settings.batch_size)
    timed: dict[str, Timed] = {}
    for dtype_name, dtype in DTYPES.items():
        for format_name, memory_format in FORMATS.items():
            student, teacher = _features(batch, dtype, memory_format, fabric.device)
            ways: dict[str, Callable[[Features, Features], object]] = {
                "authors": lambda s, t: authors_loss(s, t).backward(),
                "ours": lambda s, t: at_loss(s, t).backward(),
                "floor": floor,
            }
            if settings.compile == "on":
                compiled = torch.compile(lambda s, t: at_loss(s, t), dynamic=False)
                ways["ours compiled"] = lambda s, t, f=compiled: f(s, t).backward()  # type: ignore[misc]
            for name, way in ways.items():
                full = "authors" if not timed else f"{name} {dtype_name} {format_name}"
                timed[full] = _rate(way, student, teacher, settings.steps)
                timed[full]()
    rows = interleave(timed, settings.rounds)
    by_name = {r.name: r for r in rows}
    for row in rows:
        kind = "fp32 contiguous" if row.name == "authors" else " ".join(row.name.split()[-2:])
        bound = by_name[f"floor {kind}"].rates
        row.more = {
            "times_floor": statistics.median(f / r for f, r in zip(bound, row.rates, strict=True))
        }
    report("loss", rows, about(settings, runtime), console, file)


def authors_loss(student: Features, teacher: Features) -> Tensor:
    """Their `at_loss`, summed over the pairs, in the dtype of the features."""

    def at(x: Tensor) -> Tensor:
        return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))

    losses = [(at(s) - at(t)).pow(2).mean() for s, t in zip(student, teacher, strict=True)]
    return torch.stack(losses).sum()


def floor(student: Features, teacher: Features) -> None:
    """Reads and writes what has to be: no arithmetic to speak of."""
    with torch.no_grad():
        for s, t in zip(student, teacher, strict=True):
            s.sum(), t.sum()
            s.grad = s * 2


def _features(
    batch: int, dtype: torch.dtype, memory_format: torch.memory_format, device: torch.device
) -> tuple[Features, Features]:
    def make() -> Features:
        torch.manual_seed(0)
        shapes = [(batch, c, size, size) for c, size in SHAPES]
        return [
            torch.randn(s, device=device, dtype=dtype).to(memory_format=memory_format)
            for s in shapes
        ]

    return [f.requires_grad_() for f in make()], [f.neg() for f in make()]


def _rate(
    way: Callable[[Features, Features], object], student: Features, teacher: Features, steps: int
) -> Timed:
    def rate() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            for s in student:
                s.grad = None
            way(student, teacher)
        if student[0].device.type == "cuda":
            torch.cuda.synchronize()
        return steps * len(student[0]) / (time.perf_counter() - start)

    return rate
