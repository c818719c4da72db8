"""`bench parts`: what each measure for speed brings: the AT+KD step of a run, and the same without one of them.

Each row is a process of its own; `times_whole` is its speed over that of the whole in the same rounds.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..methods import create_methods
from ..models import create_model
from ..runtime.process import keep_malloc_arena, make_fabric, set_up_process
from ..runtime.resolve import resolve_runtime
from ..train.optimizer import make_optimizer
from ..transfer import Transfer
from .authors import AuthorsStep
from .measure import Timed, interleave, ratios, report
from .speed import Settings, about, elsewhere, recipe_of


@dataclass(frozen=True)
class Part:
    """One row: a step with everything but what is False here."""

    name: str
    two_regions: bool = True
    keep_memory: bool = True
    channels_last: bool = True
    bf16: bool = True
    compiled: bool = True


WHOLE = "at+kd"
PARTS = (
    Part(WHOLE),
    Part("one compiled region", two_regions=False),
    Part("freed memory given back", keep_memory=False),
    Part("contiguous", channels_last=False),
    Part("float32", bf16=False),
    Part("eager", compiled=False),
    Part("eager, contiguous, float32", channels_last=False, bf16=False, compiled=False),
)


def bench_parts(settings: Settings, console: Console, file: Path | None) -> None:
    """All rows, interleaved; `--compile off` leaves only the eager ones."""
    runtime = set_up_process(resolve_runtime(recipe_of(settings, "at+kd")))
    device = runtime.device
    parts = [p for p in PARTS if not p.compiled or settings.compile == "on"]
    with ExitStack() as processes:

        def begin(make: Any) -> Timed:
            return processes.enter_context(elsewhere(make, settings, device))

        timed = {"authors": begin(partial(AuthorsStep, settings.student, settings.teacher))}
        timed |= {part.name: begin(partial(PartStep, part, settings)) for part in parts}
        rows = interleave(timed, settings.rounds)
    whole = next((row for row in rows if row.name == WHOLE), rows[-1])
    for row in rows:
        row.more["times_whole"] = median(ratios(row.rates, whole.rates))
    report("parts", rows, about(settings, runtime), console, file)


class PartStep:
    """One AT+KD step on batches (N, 3, H, W), set up as `part` says."""

    def __init__(self, part: Part, settings: Settings):
        self.part, self.settings = part, settings

    def to(self, device: str) -> PartStep:
        part, settings = self.part, self.settings
        recipe = recipe_of(
            replace(settings, device=device, precision="bf16" if part.bf16 else "fp32"), "at+kd"
        )
        self.fabric = make_fabric(recipe, resolve_runtime(recipe))
        if part.keep_memory:
            keep_malloc_arena()
        self.memory_format = torch.channels_last if part.channels_last else torch.contiguous_format
        torch.manual_seed(0)
        student, teacher = (
            create_model(settings.student, 10),
            create_model(settings.teacher, 10).eval(),
        )
        student, teacher = (m.to(memory_format=self.memory_format) for m in (student, teacher))  # type: ignore[call-overload]
        methods = create_methods(recipe)
        transfer = Transfer(student, teacher, methods, example=torch.rand(2, 3, 32, 32)).to(device)
        if part.compiled:
            if part.two_regions:
                transfer.compile(dynamic=False)
            else:
                transfer.forward = torch.compile(transfer.forward, dynamic=False)  # type: ignore[method-assign]
        self.step, self.optimizer = self.fabric.setup(transfer, make_optimizer(recipe, transfer))
        return self

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.step(x.to(memory_format=self.memory_format), y, torch.tensor(0.5)).loss
        self.fabric.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()
