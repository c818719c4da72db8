"""`bench loss`: the activation loss alone, forward and backward, on the stages of a ResNet.

`authors` is their formula in eager PyTorch. `floor` is the memory traffic alone: the forward pass
reads student and teacher, the backward pass reads the student and writes its gradient. The name of
a row contains the dtype and the memory format.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from ..maps import at_loss
from .authors import at
from .measure import Measure, interleave, median_ratio, report, timed
from .options import BenchOptions
from .workload import start

SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7))  # (C, H = W) of the stages at 224 px
BATCH = 64
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Features = list[Tensor]
ForwardBackward = Callable[[Features, Features], object]


def run(options: BenchOptions, console: Console, json_file: Path | None) -> None:
    """Every candidate in every dtype and memory format; images/s of the four pairs together."""
    runtime, fabric = start(options)
    batch = min(BATCH, options.batch_size)
    measures: dict[str, Measure] = {}
    floors: dict[str, str] = {}  # for each row, the row of the floor on the same tensors
    for dtype in DTYPES:
        for memory_format in FORMATS:
            kind = f"{dtype} {memory_format}"
            student, teacher = make_features(batch, kind, fabric.device)
            for candidate, function in _candidates(options.compile == "on").items():
                # The first row is the baseline of all.
                name = f"{candidate} {kind}" if measures else "authors"
                step = partial(_step, function, student, teacher)
                measures[name] = timed(step, options.steps, batch, fabric.device)
                floors[name] = f"floor {kind}"
    rows = interleave(measures, options.rounds)
    by_name = {row.name: row for row in rows}
    for row in rows:
        row.extra["times_floor"] = median_ratio(by_name[floors[row.name]], row)
    report("loss", rows, options, runtime, console, json_file)


def _candidates(compiled: bool) -> dict[str, ForwardBackward]:
    candidates: dict[str, ForwardBackward] = {
        "authors": lambda student, teacher: authors_loss(student, teacher).backward(),
        "ours": lambda student, teacher: at_loss(student, teacher).backward(),
        "floor": floor,
    }
    if compiled:
        loss = torch.compile(lambda student, teacher: at_loss(student, teacher), dynamic=False)
        candidates["ours compiled"] = lambda student, teacher: loss(student, teacher).backward()
    return candidates


def _step(function: ForwardBackward, student: Features, teacher: Features) -> None:
    for s in student:
        s.grad = None
    function(student, teacher)


def authors_loss(student: Features, teacher: Features) -> Tensor:
    """Their `at_loss`, summed over the pairs, in the dtype of the features."""
    losses = [(at(s) - at(t)).pow(2).mean() for s, t in zip(student, teacher, strict=True)]
    return torch.stack(losses).sum()


def floor(student: Features, teacher: Features) -> None:
    """The memory reads and writes of a loss and its gradient, with hardly any arithmetic."""
    with torch.no_grad():
        for s, t in zip(student, teacher, strict=True):
            s.sum(), t.sum()  # read everything, write nothing
            s.grad = s * 2


def make_features(batch: int, kind: str, device: torch.device) -> tuple[Features, Features]:
    """Features of student and teacher; `kind` is a dtype and a memory format."""
    dtype, memory_format = kind.split()
    torch.manual_seed(0)
    student = []
    for channels, size in SHAPES:
        features = torch.randn(batch, channels, size, size, device=device, dtype=DTYPES[dtype])
        student.append(features.to(memory_format=FORMATS[memory_format]).requires_grad_())
    return student, [s.detach().neg() for s in student]
