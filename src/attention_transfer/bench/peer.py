"""`bench peer`: AT and AT+KD steps by torchdistill, the library that has them too, against ours on the same networks.

Theirs is their `DistillationBox` with their `ATLoss` (mode `code`), `KDLoss` and hooks, in a process of its own; ours
is the `Transfer`. `fp32` is eager on both sides, as in their examples; `bf16` is eager under autocast in channels_last
on both, the best that plain PyTorch gives a user of theirs; `compiled` is what a run of ours uses. The row `authors` is
AT+KD. `times_peer`: over theirs of the same method and precision; what is compiled, over the faster of theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..errors import UserError
from ..models import create_model
from ..runtime.process import make_fabric, set_up_process
from ..runtime.resolve import resolve_runtime
from .authors import AuthorsStep
from .measure import Timed, interleave, ratios, report
from .speed import Settings, about, elsewhere, rate, recipe_of, training_step

PEER = "torchdistill"
METHODS = ("at", "at+kd")
LAYERS = ("group0", "group1", "group2")
BETA, ALPHA, TEMPERATURE, RATE = 1e3, 0.9, 4.0, 0.01


class PeerStep:
    """One step of torchdistill's on batches (N, 3, H, W) float32, on WRNs with random weights (seed 0)."""

    def __init__(self, student: str, teacher: str, method: str, bf16: bool = False):
        torch.manual_seed(0)
        self.student, self.teacher = (
            create_model(student, 10).train(),
            create_model(teacher, 10).eval(),
        )
        self.method, self.bf16 = method, bf16

    def to(self, device: str) -> PeerStep:
        from torchdistill.common.constant import def_logger
        from torchdistill.core.distillation import DistillationBox

        def_logger.setLevel(logging.WARNING)
        memory_format = torch.channels_last if self.bf16 else torch.contiguous_format
        networks = (
            n.to(device).to(memory_format=memory_format) for n in (self.teacher, self.student)
        )
        self.device, self.memory_format = torch.device(device), memory_format
        self.box = DistillationBox(*networks, {}, config(self.method), self.device, [], False, 1)
        return self

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.box.forward_process(x.to(memory_format=self.memory_format), y)
        self.box.post_forward_process(loss)
        return loss


def config(method: str) -> dict[str, Any]:
    """Their configuration of the authors' loss: β on the sum over pairs, and with KD the weights 1 − α and α."""

    def place(layer: str) -> dict[str, str]:
        return {"io": "output", "path": layer}

    pairs = {
        layer: {"teacher": place(layer), "student": place(layer), "weight": 1} for layer in LAYERS
    }
    hard: dict[str, Any] = {
        "criterion": {"key": "CrossEntropyLoss", "kwargs": {}},
        "criterion_wrapper": {
            "key": "SimpleLossWrapper",
            "kwargs": {
                "input": {"is_from_teacher": False, "module_path": ".", "io": "output"},
                "target": {"uses_label": True},
            },
        },
        "weight": 1.0,
    }
    where = {
        f"{who}_module_{what}": v
        for who in ("student", "teacher")
        for what, v in (("path", "."), ("io", "output"))
    }
    soft = {
        "criterion": {
            "key": "KDLoss",
            "kwargs": {**where, "temperature": TEMPERATURE, "alpha": 1 - ALPHA},
        }
    }
    attention = {
        "criterion": {"key": "ATLoss", "kwargs": {"at_pairs": pairs, "mode": "code"}},
        "weight": BETA,
    }
    hooks = {"forward_hook": {"output": list(LAYERS)}, "forward_proc": "forward_batch_only"}
    terms = (
        {"at": attention, "kd": soft | {"weight": 1.0}}
        if method == "at+kd"
        else {"ce": hard, "at": attention}
    )
    return {
        "num_epochs": 1,
        "teacher": hooks | {"requires_grad": False},
        "student": dict(hooks),
        "optimizer": {"key": "SGD", "kwargs": {"lr": RATE, "momentum": 0.9, "weight_decay": 5e-4}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }


def bench_peer(settings: Settings, console: Console, file: Path | None) -> None:
    """Theirs and ours in turn, round after round; `--compile off` leaves the compiled rows out."""
    if find_spec(PEER) is None:
        raise UserError(
            f"bench peer compares with {PEER}, which is not installed: pip install 'attention-transfer[peers]'"
        )
    runtime = set_up_process(resolve_runtime(recipe_of(settings, "at+kd")))
    fabric = make_fabric(recipe_of(settings, "at+kd"), runtime)
    torch.compiler.reset()
    device = str(fabric.device)
    with ExitStack() as stack:
        authors = partial(AuthorsStep, settings.student, settings.teacher)
        timed: dict[str, Timed] = {
            "authors": stack.enter_context(elsewhere(authors, settings, device))
        }
        for method in METHODS:
            for precision in ("fp32", "bf16"):
                theirs = partial(
                    PeerStep, settings.student, settings.teacher, method, precision == "bf16"
                )
                timed[f"{PEER} {method} {precision}"] = stack.enter_context(
                    elsewhere(theirs, settings, device)
                )
        timed |= dict(_ours(settings))
        rows = interleave(timed, settings.rounds)
    by_name = {row.name: row for row in rows}
    for row in rows:
        _, method, *kind = ["", "at+kd", "fp32"] if row.name == "authors" else row.name.split()
        # What is compiled is compared with the faster of theirs, which is not the same on every machine.
        same = [f"{PEER} {method} {p}" for p in ("fp32", "bf16") if kind in (["compiled"], [p])]
        best = max((by_name[n] for n in same), key=lambda r: float(r.to_dict()["median"]))
        row.more["times_peer"] = median(ratios(row.rates, best.rates))
    report("peer", rows, about(settings, runtime), console, file)


def _ours(settings: Settings) -> Iterator[tuple[str, Timed]]:
    """Our rows, each run once."""
    kinds = [("fp32", "fp32", "off"), ("bf16", "bf16", "off")]
    if settings.compile == "on":
        kinds.append(("compiled", settings.precision, "on"))
    for method in METHODS:
        for kind, precision, compiled in kinds:
            own = replace(settings, precision=precision, compile=compiled)
            recipe = recipe_of(own, method)
            runtime = set_up_process(resolve_runtime(recipe))
            fabric = make_fabric(recipe, runtime)
            torch.manual_seed(1)
            x = torch.rand(own.batch_size, 3, 32, 32, device=fabric.device).to(
                memory_format=torch.channels_last
            )
            y = torch.randint(10, (own.batch_size,), device=fabric.device)
            run = rate(training_step(own, method, x, y, fabric, runtime), own, fabric)
            run()
            yield f"ours {method} {kind}", run
