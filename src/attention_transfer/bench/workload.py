"""The workloads of the benches: the training step of a run, and the inference of its teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from ..methods.options import MethodOptions
from ..methods.registry import create_methods
from ..models.create import create_model
from ..runtime.cuda_graphs import CudaGraphs
from ..runtime.options import RuntimeOptions
from ..runtime.process import compile_transfer, make_fabric, set_up_process
from ..runtime.resolve import RuntimeConfig, resolve_runtime
from ..teacher import TeacherOutput
from ..train.optimizer import make_optimizer
from ..train.options import OptimizerOptions
from ..transfer import Transfer
from .measure import Measure, timed
from .options import BenchOptions

Batch = tuple[Tensor, Tensor]  # images (N, 3, H, W), labels (N,)


def start(options: BenchOptions, devices: int = 1) -> tuple[RuntimeConfig, Fabric]:
    """Sets up this process as a run does."""
    runtime_options = RuntimeOptions(
        options.device, options.precision, options.compile, devices=devices
    )
    runtime = set_up_process(resolve_runtime(runtime_options))
    return runtime, make_fabric(runtime_options, runtime)


def random_batch(batch_size: int, device: torch.device, size: int = 32) -> Batch:
    torch.manual_seed(1)
    x = torch.rand(batch_size, 3, size, size, device=device)
    y = torch.randint(10, (batch_size,), device=device)
    return x.to(memory_format=torch.channels_last), y


def create_network(
    name: str, memory_format: torch.memory_format = torch.channels_last
) -> nn.Module:
    return create_model(name, 10).to(memory_format=memory_format)  # type: ignore[call-overload, no-any-return]


def make_transfer(
    options: BenchOptions,
    method: str,
    x: Tensor,
    pairs: str = "auto",
    memory_format: torch.memory_format = torch.channels_last,
) -> Transfer:
    """The networks of `options`, with random weights, for batches like `x`."""
    # The same weights in every row.
    torch.manual_seed(0)
    student = create_network(options.student, memory_format)
    methods = create_methods(MethodOptions(method=method))
    teacher = None
    if any(m.needs_teacher for m in methods):
        teacher = create_network(options.teacher, memory_format)
    transfer = Transfer(student, teacher, methods, pairs, example=torch.rand(2, *x.shape[1:]))
    return transfer.to(x.device)


def training_step(
    transfer: Transfer,
    batch: Batch,
    runtime: RuntimeConfig,
    fabric: Fabric,
    teacher_output: Callable[[], TeacherOutput | None] = lambda: None,
) -> Callable[[], None]:
    """A step of a run on a batch on the device; `teacher_output` reads its stored outputs."""
    x, y = batch
    if runtime.compile:
        compile_transfer(transfer, runtime)
    optimizer = make_optimizer(OptimizerOptions(lr=0.01), transfer)
    wrapped, wrapped_optimizer = fabric.setup(transfer, optimizer)
    # A tensor, as in a run: a Python number would become a constant of the compiled step.
    progress = torch.full((), 0.5, device=fabric.device)
    graphs = CudaGraphs()

    def step() -> None:
        if runtime.graphs:
            graphs.begin()
        output = wrapped(x, y, progress, teacher=teacher_output())
        fabric.backward(output.loss)
        wrapped_optimizer.step()
        wrapped_optimizer.zero_grad()
        if runtime.graphs:
            graphs.check()

    return step


def measure_step(
    options: BenchOptions,
    runtime: RuntimeConfig,
    fabric: Fabric,
    batch: Batch,
    method: str,
    pairs: str = "auto",
) -> Measure:
    """Measures the training step of a run."""
    transfer = make_transfer(options, method, batch[0], pairs)
    step = training_step(transfer, batch, runtime, fabric)
    return timed(step, options.steps, options.batch_size, fabric.device)


def measure_teacher(
    options: BenchOptions,
    runtime: RuntimeConfig,
    fabric: Fabric,
    x: Tensor,
    memory_format: torch.memory_format = torch.channels_last,
) -> Measure:
    """Measures the teacher's logits and features in an AT+KD step, without gradients."""
    x = x.to(memory_format=memory_format)
    transfer = make_transfer(options, "at+kd", x, memory_format=memory_format)
    if runtime.compile:
        transfer.compile(**runtime.compile_options())

    def infer() -> None:
        with fabric.autocast():
            transfer.run_teacher(x)

    return timed(infer, options.steps, options.batch_size, fabric.device)
