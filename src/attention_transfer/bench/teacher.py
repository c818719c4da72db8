"""`bench teacher`: inference of the teacher, logits and tapped features, in every form that could stand in a step.

`authors` is their functional network in eager float32, in a process of its own; `compiled` is what a run uses.
`logits_error` and `maps_error` are the largest difference from float64 as a share of the largest value there, of the
logits and of the worst attention map; what bfloat16 costs by itself is the row `eager bf16`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
import torch._inductor.config
from lightning.fabric import Fabric
from rich.console import Console
from torch import Tensor, nn

from ..maps import attention_map
from ..methods import create_methods
from ..methods.options import MethodOptions
from ..models import create_model
from ..runtime.process import make_fabric, set_up_process
from ..runtime.resolve import resolve_runtime
from ..transfer import Transfer
from .authors import AuthorsInference
from .fold import fold_batch_norms
from .measure import Timed, interleave, report
from .speed import Settings, about, elsewhere, rate, recipe_of

Seen = tuple[Tensor, list[Tensor]]


@dataclass(frozen=True)
class Form:
    """One row. `folded`: batch normalisation in the convolutions; `frozen`: the compiler knows the weights' values."""

    name: str
    precision: str = "auto"
    channels_last: bool = True
    folded: bool = False
    compiled: bool = False
    frozen: bool = False


FORMS = (
    Form("eager fp32", "fp32", channels_last=False),
    Form("eager fp32 channels_last", "fp32"),
    Form("eager bf16 channels_last", "bf16"),
    Form("eager folded", folded=True),
    Form("compiled", compiled=True),
    Form("compiled folded", folded=True, compiled=True),
    Form("compiled frozen", compiled=True, frozen=True),
    Form("compiled folded frozen", folded=True, compiled=True, frozen=True),
)


def bench_teacher(settings: Settings, console: Console, file: Path | None) -> None:
    """Every form, interleaved; `--compile off` leaves the compiled ones out."""
    recipe = recipe_of(settings, "at+kd")
    runtime = set_up_process(resolve_runtime(recipe))
    fabric = make_fabric(recipe, runtime)
    torch.compiler.reset()
    teacher = calibrated(settings.teacher)
    torch.manual_seed(1)
    x = torch.rand(settings.batch_size, 3, 32, 32, device=fabric.device)
    true = _read(_transfer(settings, teacher, x).double(), x.double())
    theirs = AuthorsInference(settings.teacher, state=dict(teacher.state_dict())).to(
        str(fabric.device)
    )
    errors = {"authors": error(theirs(x), true)}
    with elsewhere(
        partial(AuthorsInference, settings.teacher), settings, str(fabric.device)
    ) as authors_rate:
        timed: dict[str, Timed] = {"authors": authors_rate}
        for form in FORMS:
            if form.compiled and settings.compile != "on":
                continue
            run = make(form, settings, teacher, x)
            errors[form.name] = error(run(), true)
            timed[form.name] = rate(run, settings, fabric)
            timed[form.name]()
        rows = interleave(timed, settings.rounds)
    for row in rows:
        row.more = errors[row.name]
    report("teacher", rows, about(settings, runtime), console, file)


def calibrated(name: str) -> nn.Module:
    """A network with random weights whose batch normalisation has the statistics of some random images."""
    torch.manual_seed(0)
    model = create_model(name, 10)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # so that the average is over what it sees here
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.rand(64, 3, 32, 32))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def make(form: Form, settings: Settings, teacher: nn.Module, x: Tensor) -> Callable[[], Seen]:
    """The inference of one form on a batch that lies ready."""
    precision = settings.precision if form.precision == "auto" else form.precision
    recipe = replace(recipe_of(settings, "at+kd"), precision=precision)
    fabric: Fabric = make_fabric(recipe, set_up_process(resolve_runtime(recipe)))
    layers = [t for _, t in _transfer(settings, teacher, x).pairs]
    if form.folded:
        teacher = fold_batch_norms(teacher, x[:2].cpu(), layers)[0]
    memory_format = torch.channels_last if form.channels_last else torch.contiguous_format
    transfer = _transfer(settings, teacher.to(memory_format=memory_format), x)
    x = x.to(memory_format=memory_format)

    def inference(x: Tensor) -> Any:
        return transfer.run_teacher(x)

    side: Any = inference
    if form.compiled:
        # The compiler keeps its work by code object: one of its own, or a form would run what another one compiled.
        own = FunctionType(inference.__code__.replace(), globals(), closure=inference.__closure__)
        side = torch.compile(own, dynamic=False)

    def run() -> Seen:
        # Weights are frozen only where it is said from outside that nothing is differentiated.
        with torch.no_grad(), fabric.autocast():
            logits, features, _ = side(x)
        return logits, features

    # As an option of this one compilation it would do nothing: it is read while the graph is traced.
    with torch._inductor.config.patch(freezing=form.frozen):
        run()
    return run


def _transfer(settings: Settings, teacher: nn.Module, x: Tensor) -> Transfer:
    """AT+KD of this teacher on the device of `x`."""
    student = create_model(settings.student, 10)
    methods = create_methods(MethodOptions(method="at+kd"))
    transfer = Transfer(
        student, teacher.cpu(), methods, example=x[:2].cpu().float()
    )
    return transfer.to(x.device)


def _read(transfer: Transfer, x: Tensor) -> Seen:
    with torch.no_grad():
        logits, features, _ = transfer.run_teacher(x)
    assert logits is not None
    return logits, features


def error(found: Seen, true: Seen) -> dict[str, float]:
    """The largest error of the logits, and of the attention maps, against the truth in float64."""

    def relative(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b).abs().amax() / b.abs().amax())

    maps = [
        relative(attention_map(a), attention_map(b)) for a, b in zip(found[1], true[1], strict=True)
    ]
    return {"logits_error": relative(found[0], true[0]), "maps_error": max(maps)}
