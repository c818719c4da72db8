"""The methods on input gradients against PyTorch's own double backward.

    python bench/double_backward.py --rounds 7 --steps 2 --json results/bench/double_backward.json

`authors` is the student alone in plain PyTorch, eager and float32, and `student` is ours with no
method. `… plain` is the method in plain PyTorch, eager and float32; `… plain tuned` the same in
channels_last and, if the machine is fast at it, in bfloat16. `times_student` and `peak_mib` are
those of `attention-transfer bench gradient`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import main
from lightning.fabric import Fabric
from rich.console import Console
from torch import Tensor, nn

from attention_transfer.bench import BenchOptions
from attention_transfer.bench.gradient import Step, make_plain_step, make_step, run_steps
from attention_transfer.bench.workload import Batch, create_network, random_batch, start

METHODS = ("min-l2", "symmetry", "gradient")
DEFAULTS = {"student": "nin-thin-no-bn", "teacher": "nin-wide-no-bn", "compile": "off"}


def run(options: BenchOptions, console: Console, json_file: Path | None) -> None:
    steps: dict[str, Callable[[], Step]] = {
        "authors": partial(make_plain_step, options),
        "student": partial(make_step, options, "none"),
    }
    for method in METHODS:
        steps[f"{method} plain"] = partial(make_double_backward, options, method, tuned=False)
        steps[f"{method} plain tuned"] = partial(make_double_backward, options, method, tuned=True)
        steps[method] = partial(make_step, options, method)
    run_steps("double_backward", steps, options, console, json_file)


def make_double_backward(options: BenchOptions, method: str, tuned: bool) -> Step:
    """One training step in plain PyTorch on a fixed batch."""
    memory_format = torch.channels_last
    if not tuned:
        options = replace(options, precision="fp32")
        memory_format = torch.contiguous_format
    _, fabric = start(options)
    x, y = random_batch(options.batch_size, fabric.device)
    student = create_network(options.student, memory_format).to(fabric.device)
    teacher = create_network(options.teacher, memory_format).to(fabric.device).eval()
    batch = (x.to(memory_format=memory_format), y)
    return double_backward_step(method, student, teacher, batch, fabric)


def double_backward_step(
    method: str, student: nn.Module, teacher: nn.Module, batch: Batch, fabric: Fabric
) -> Step:
    """A step by PyTorch's double backward, with β = 1; only the autocast is Fabric's."""
    optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        optimizer.zero_grad()
        with fabric.autocast():
            loss = double_backward_loss(method, student, teacher, *batch)
        loss.backward()
        optimizer.step()

    return step


def double_backward_loss(
    method: str, student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor
) -> Tensor:
    """Cross-entropy + ½·mean‖·‖² of the method's input gradients."""
    if method == "symmetry":
        both, labels = torch.cat([x, x.flip(3)]), torch.cat([y, y])
        logits, j = input_gradient(student, both, labels, create_graph=True)
        logits, difference = logits[: len(x)], j[: len(x)] - j[len(x) :].flip(3)
    else:
        logits, difference = input_gradient(student, x, y, create_graph=True)
    if method == "gradient":
        difference = difference - input_gradient(teacher, x, y, create_graph=False)[1]
    return F.cross_entropy(logits, y) + difference.flatten(1).square().sum(1).mean() / 2


def input_gradient(
    model: nn.Module, x: Tensor, y: Tensor, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """Logits, and ∂CE/∂x of each sample."""
    x = x.detach().requires_grad_()
    logits = model(x).float()
    loss = F.cross_entropy(logits, y, reduction="sum")
    return logits, torch.autograd.grad(loss, x, create_graph=create_graph)[0]


if __name__ == "__main__":
    main(__doc__, run, DEFAULTS)
