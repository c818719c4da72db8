"""`bench step` and `bench epoch`: AT+KD training against the authors' step and against its own floor.

The floor is what the student's training step and the teacher's inference cost alone.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from rich.console import Console

from ..apply.inference import as_input
from ..config import Recipe, make_recipe
from ..data import ImageSet
from ..errors import RunError, UserError
from ..methods import create_methods
from ..models import create_model
from ..run_folder import RunFolder
from ..runtime.cuda_graphs import CudaGraphs
from ..runtime.environment import environment
from ..runtime.process import make_fabric, set_up_process
from ..runtime.resolve import RuntimeConfig, resolve_runtime
from ..train.assemble import assemble, make_trainer
from ..train.optimizer import make_optimizer
from ..train.progress import ProgressBar
from ..transfer import Transfer
from .authors import AuthorsStep, serve
from .measure import Timed, interleave, report
from .options import BenchOptions as Settings


def bench_step(settings: Settings, console: Console, file: Path | None) -> None:
    """One training step on a batch that lies ready: authors, student, teacher, at, kd, at+kd; on a GPU also the last as
    CUDA graphs."""
    recipe = recipe_of(settings, "none")
    runtime = set_up_process(resolve_runtime(recipe))
    fabric = make_fabric(recipe, runtime)
    torch.compiler.reset()
    torch.manual_seed(1)
    x = torch.rand(settings.batch_size, 3, 32, 32, device=fabric.device).to(
        memory_format=torch.channels_last
    )
    y = torch.randint(10, (settings.batch_size,), device=fabric.device)
    with authors(settings, str(fabric.device), None) as authors_rate:
        timed: dict[str, Timed] = {"authors": authors_rate}
        methods = {"student": "none", "teacher": None, "at": "at", "kd": "kd", "at+kd": "at+kd"}
        if runtime.device == "cuda" and runtime.compile:
            methods["at+kd graphs"] = "at+kd"
        for name, method in methods.items():
            how = replace(runtime, graphs=name.endswith("graphs"))
            timed[name] = rate(training_step(settings, method, x, y, fabric, how), settings, fabric)
            timed[name]()
        rows = interleave(timed, settings.rounds)
    report("step", rows, about(settings, runtime), console, file)


def bench_epoch(settings: Settings, console: Console, file: Path | None) -> None:
    """A whole epoch with augmentation, metrics and checkpoint, AT+KD; the authors' with their loader and meters.

    The images are the built-in digits, which cost what CIFAR-10's cost; validation is left out on both sides.
    """
    if settings.images < settings.batch_size:
        raise UserError(
            f"--images is {settings.images}: expected at least one batch of {settings.batch_size}"
        )
    with tempfile.TemporaryDirectory() as temporary:
        recipe = recipe_of(settings, "at+kd")
        runtime = set_up_process(resolve_runtime(recipe))
        fabric = make_fabric(recipe, runtime)
        teacher = Path(temporary) / "teacher.pt"
        torch.save(create_model(settings.teacher, 10).state_dict(), teacher)
        parts = assemble(replace(recipe, teacher_weights=str(teacher)))
        images = parts.data.train
        assert isinstance(images, ImageSet), "the digits are in memory"
        folder = RunFolder(Path(temporary) / "run")
        quiet = ProgressBar(Console(quiet=True), "", 1)
        loop = make_trainer(recipe, folder, fabric, parts, runtime, quiet)
        loop.validate = lambda: {"loss": 0.0, "accuracy": 0.0}
        first = slice(0, settings.batch_size)
        x, y = (
            as_input(images.batch(first).to(fabric.device)),
            images.labels[first].to(fabric.device),
        )

        def epoch() -> float:
            start = time.perf_counter()
            loop.train_epoch()
            return loop.steps_per_epoch * loop.batch_size / (time.perf_counter() - start)

        def step() -> None:
            loop.train_step(x, y)
            loop.step -= 1  # it belongs to no epoch

        epoch()
        rates: dict[str, Timed] = {}
        data = (images.images.cpu().numpy(), images.labels.cpu().numpy())
        with authors(
            replace(settings, steps=len(images) // settings.batch_size), str(fabric.device), data
        ) as authors_rate:
            rates["authors"] = authors_rate
            rates["step"] = rate(step, replace(settings, steps=loop.steps_per_epoch), fabric)
            rates["epoch"] = epoch
            rows = interleave(rates, settings.rounds)
    report("epoch", rows, about(settings, runtime), console, file)


@contextmanager
def authors(settings: Settings, device: str, data: Any) -> Iterator[Timed]:
    """The authors' step in a process of its own: a function that runs it and returns images/s."""
    with elsewhere(
        partial(AuthorsStep, settings.student, settings.teacher), settings, device, data
    ) as rate:
        yield rate


@contextmanager
def elsewhere(
    make: Callable[[], Any],
    settings: Settings,
    device: str,
    data: Any = None,
    size: int = 32,
    warm: bool = True,
) -> Iterator[Timed]:
    """What `make` gives (see `serve`), in a process of its own whose allocator and threads nobody has tuned.

    It has run once before it is handed out, unless `warm` is False.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    arguments = (there, make, settings.batch_size, device.split(":")[0], data, size)
    process = context.Process(target=serve, args=arguments)
    process.start()
    there.close()  # so that a process that died is an end of file here, and not a wait

    def rate() -> float:
        try:
            here.send(settings.steps)
            return settings.steps * settings.batch_size / here.recv()
        except (EOFError, OSError):
            raise RunError(
                "the process of what is compared with died; its own message is above"
            ) from None

    try:
        if warm:
            rate()
        yield rate
        here.send(None)
        process.join(10)
    finally:
        process.kill()
        process.join()


def recipe_of(settings: Settings, method: str) -> Recipe:
    return make_recipe(
        {
            "command": "distill",
            "model": settings.student,
            "teacher": settings.teacher,
            "method": method,
            "data": "digits",
            "limit_train": settings.images,
            "epochs": 1000,
            "batch_size": settings.batch_size,
            "schedule": "constant",
            "lr": 0.01,
            "device": settings.device,
            "precision": settings.precision,
            "compile": settings.compile,
        }
    )


def training_step(
    settings: Settings,
    method: str | None,
    x: torch.Tensor,
    y: torch.Tensor,
    fabric: Fabric,
    runtime: RuntimeConfig,
    pairs: str = "auto",
) -> Callable[[], object]:
    """One step of ours; with method None the teacher's inference alone."""
    student, teacher = create_model(settings.student, 10), create_model(settings.teacher, 10).eval()
    recipe = recipe_of(settings, method or "at+kd")
    methods = create_methods(recipe)
    student, teacher = (m.to(memory_format=torch.channels_last) for m in (student, teacher))
    transfer = Transfer(student, teacher, methods, pairs, example=torch.rand(2, *x.shape[1:]))
    transfer.to(fabric.device)
    if runtime.compile:
        transfer.compile(**runtime.compile_options())
    if method is None:

        def infer() -> None:
            with fabric.autocast():
                transfer.run_teacher(x)

        return infer
    optimizer = make_optimizer(recipe, transfer)
    wrapped, wrapped_optimizer = fabric.setup(transfer, optimizer)

    progress = torch.full((), 0.5, device=fabric.device)
    graphs = CudaGraphs() if runtime.graphs else None

    def step() -> None:
        if graphs is not None:
            graphs.begin()
        output = wrapped(x, y, progress)
        fabric.backward(output.loss)
        wrapped_optimizer.step()
        wrapped_optimizer.zero_grad()
        if graphs is not None:
            graphs.check()

    return step


def rate(run: Callable[[], object], settings: Settings, fabric: Fabric) -> Timed:
    def rate() -> float:
        start = time.perf_counter()
        for _ in range(settings.steps):
            run()
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        return settings.steps * settings.batch_size / (time.perf_counter() - start)

    return rate


def about(settings: Settings, runtime: RuntimeConfig) -> dict[str, Any]:
    about = environment(runtime)
    return {**about, "settings": vars(settings)}
