"""`bench scale`: what a step of AT+KD costs as batch, width, depth, image size, pairs and processes grow.

Each point is measured like `bench step`, its own rounds interleaved: the authors' step at the same point, ours, and
what ours is made of. `share` is the part of the step that is neither the student's training nor the teacher's,
each measured alone: what transfer adds. Everything but one axis stays at the base, the row `authors`. Several processes
divide the batch among them; `runs` are trainings of their own, side by side on one device, whose images add up. The
authors' is one process all the same.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

from ..errors import RunError, UserError
from ..runtime.process import make_fabric, set_up_process
from ..runtime.resolve import resolve_runtime
from .authors import AuthorsStep
from .measure import Row, Timed, interleave, report
from .speed import Settings, about, elsewhere, rate, recipe_of, training_step

# What a step is made of, and the method that measures it; None is the teacher's inference.
PARTS = {"student": "none", "teacher": None, "step": "at+kd"}
AXES: dict[str, tuple[int, ...]] = {
    "width": (1, 2, 3),
    "depth": (10, 16, 28),
    "image size": (32, 48, 64),
    "pairs": (0, 1, 2, 3),
    "processes": (1, 2),
}
HIDDEN = ("axis", "value", "authors_rate", "student_rate", "teacher_rate")  # for the plot
RUNS = {"cpu": (1, 2), "cuda": (1, 2, 4, 8, 16), "mps": (1, 2)}


@dataclass(frozen=True)
class Point:
    """Where a step is measured: a student wrn-depth-width and a teacher twice as wide."""

    batch: int
    width: int = 1
    depth: int = 16
    size: int = 32
    pairs: int = 3
    processes: int = 1
    runs: int = 1

    def settings(self, settings: Settings) -> Settings:
        student, teacher = (f"wrn-{self.depth}-{width}" for width in (self.width, 2 * self.width))
        steps = settings.steps * max(1, settings.batch_size // self.batch)  # no fewer images
        return replace(
            settings, student=student, teacher=teacher, batch_size=self.batch, steps=steps
        )


def points(batch: int, runs: Sequence[int] = RUNS["cpu"]) -> list[tuple[str, int, Point]]:
    """(axis, value, point), the base once on every axis."""
    base = Point(batch)
    found = [
        ("batch", b, replace(base, batch=b)) for b in (batch // 4, batch // 2, batch, 2 * batch)
    ]
    for axis, values in (*AXES.items(), ("runs", runs)):
        key = {"image size": "size"}.get(axis, axis)
        found += [(axis, value, replace(base, **{key: value})) for value in values]
    return found


def bench_scale(
    settings: Settings, console: Console, file: Path | None, plot: Path | None = None
) -> None:
    """Every point in turn; `plot` draws what was found."""
    if settings.batch_size < 4:
        raise UserError(
            f"--batch-size is {settings.batch_size}: expected at least 4, since a quarter of it is measured"
        )
    runtime = set_up_process(resolve_runtime(recipe_of(settings, "at+kd")))
    rows: list[Row] = []
    known: dict[Point, dict[str, Row]] = {}
    for axis, value, point in points(settings.batch_size, RUNS[runtime.device]):
        if (
            point.processes > 1
            and runtime.device != "cpu"
            and torch.cuda.device_count() < point.processes
        ):
            continue
        if point not in known:
            console.print(f"{axis} {value}", markup=False, highlight=False)
            known[point] = measure(point, point.settings(settings))
        rows.append(_row(f"{axis} {value}", known[point], {"axis": axis, "value": value}))
    base = known[Point(settings.batch_size)]["authors"]
    rows.insert(0, Row("authors", base.rates, base.ratios))
    report("scale", rows, about(settings, runtime), console, file, hidden=HIDDEN)
    if plot is not None:
        from .scale_plot import draw

        draw([row.to_dict() for row in rows], plot)
        console.print(f"drawn: {plot}", markup=False, highlight=False, soft_wrap=True)


def _row(name: str, found: dict[str, Row], where: dict[str, object]) -> Row:
    step, student, teacher = (found[part] for part in ("step", "student", "teacher"))
    # In each round: seconds an image are 1/rate.
    triples = zip(step.rates, student.rates, teacher.rates, strict=True)
    share = median(1 - whole / alone - whole / inference for whole, alone, inference in triples)
    parts = {
        f"{part}_rate": median(found[part].rates) for part in ("authors", "student", "teacher")
    }
    return Row(name, step.rates, step.ratios, {**where, **parts, "share": share})


def measure(point: Point, settings: Settings) -> dict[str, Row]:
    """The authors' step and ours in parts, at one point."""
    device = set_up_process(resolve_runtime(recipe_of(settings, "at+kd"))).device
    theirs = partial(AuthorsStep, settings.student, settings.teacher)
    torch.compiler.reset()
    here = _one_process if point.processes == point.runs == 1 else _processes
    with (
        elsewhere(theirs, settings, device, size=point.size) as authors,
        here(point, settings) as timed,
    ):
        for run in timed.values():
            run()
        return {row.name: row for row in interleave({"authors": authors} | timed, settings.rounds)}


@contextmanager
def _one_process(point: Point, settings: Settings) -> Iterator[dict[str, Timed]]:
    yield {part: make_rate(method, point, settings) for part, method in PARTS.items()}


def make_rate(method: str | None, point: Point, settings: Settings) -> Timed:
    """Images/s of a part of the step in this process, on its share of the batch."""
    if method == "at+kd" and point.pairs == 0:
        method = "kd"
    recipe = replace(recipe_of(settings, method or "at+kd"), devices=point.processes)
    runtime = set_up_process(resolve_runtime(recipe))
    fabric = make_fabric(recipe, runtime)
    torch.manual_seed(1)
    share = settings.batch_size // point.processes
    x = torch.rand(share, 3, point.size, point.size, device=fabric.device).to(
        memory_format=torch.channels_last
    )
    y = torch.randint(10, (share,), device=fabric.device)
    pairs = f"last{point.pairs}" if point.pairs else "auto"
    return rate(training_step(settings, method, x, y, fabric, runtime, pairs), settings, fabric)


@contextmanager
def _processes(point: Point, settings: Settings) -> Iterator[dict[str, Timed]]:
    """The same by several processes, each on its share of the cores or a GPU of its own; or by several runs."""
    context = multiprocessing.get_context("spawn")
    port = free_port()
    pipes, processes = [], []
    for rank in range(point.processes * point.runs):
        here, there = context.Pipe()
        process = context.Process(
            target=_serve, args=(there, rank, port, point, settings), daemon=True
        )
        process.start()
        there.close()  # so that a process that died is an end of file here, and not a wait
        pipes.append(here)
        processes.append(process)

    def ask(part: str) -> float:
        for pipe in pipes:
            pipe.send(part)
        try:
            rates = [pipe.recv() for pipe in pipes]
        except (EOFError, OSError):
            raise RunError(
                "a process of a step by several died; its own message is above"
            ) from None
        return point.runs * min(
            rates
        )  # processes wait for the slowest, and a run that ends last has more for itself

    try:
        yield {part: partial(ask, part) for part in PARTS}
    finally:
        for process in processes:
            process.kill()
            process.join()


def _serve(pipe: Connection, rank: int, port: int, point: Point, settings: Settings) -> None:
    """Process or run `rank`: answers the name of a part with its images/s, of the whole batch."""
    if point.processes > 1:
        os.environ |= torchrun_words(rank, point.processes, port)
    torch.set_num_threads(max(1, torch.get_num_threads() // (point.processes * point.runs)))
    timed: dict[str, Callable[[], float]] = {
        part: make_rate(method, point, settings) for part, method in PARTS.items()
    }
    while True:
        if point.processes > 1:
            torch.distributed.barrier()
        pipe.send(timed[pipe.recv()]())


def torchrun_words(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun says to the processes that it starts on one node, and Fabric reads."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "here",
    }


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
