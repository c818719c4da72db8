"""The cost of an AT+KD step by batch, width, depth, image size, pairs, processes and runs.

    python bench/sweep.py --rounds 5 --steps 4 --json results/bench/sweep.json
    python bench/sweep_plot.py results/bench/sweep.json docs/scale.png

Each point is measured like `bench step`, its rounds interleaved: the authors' step at the same
point, ours, and the parts of ours. `share` is the part of the step that is neither the student's
training nor the teacher's inference, each measured alone. One axis at a time is varied from the
base, the row `authors`. Several processes split the batch; `runs` are separate trainings at the
same time on one device, whose images are added. The authors' step is always one process.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
from harness import main
from rich.console import Console

from attention_transfer.bench import BenchOptions
from attention_transfer.bench.authors import authors_step
from attention_transfer.bench.measure import BenchRow, Measure, interleave, report
from attention_transfer.bench.workload import measure_step, measure_teacher, random_batch, start
from attention_transfer.errors import RunError, UserError

# Each of about 20 points would be compiled.
DEFAULTS = {"rounds": 3, "steps": 2, "compile": "off"}
PARTS = ("student", "teacher", "step")
AXES: dict[str, tuple[int, ...]] = {
    "width": (1, 2, 3),
    "depth": (10, 16, 28),
    "image size": (32, 48, 64),
    "pairs": (0, 1, 2, 3),
    "processes": (1, 2),
}
RUNS = {"cpu": (1, 2), "cuda": (1, 2, 4, 8, 16), "mps": (1, 2)}


@dataclass(frozen=True)
class Point:
    """A point of the sweep: a student wrn-depth-width and a teacher twice as wide."""

    batch: int
    width: int = 1
    depth: int = 16
    size: int = 32
    pairs: int = 3
    processes: int = 1
    runs: int = 1

    def options(self, options: BenchOptions) -> BenchOptions:
        return replace(
            options,
            student=f"wrn-{self.depth}-{self.width}",
            teacher=f"wrn-{self.depth}-{2 * self.width}",
            batch_size=self.batch,
            # At least as many images as at the base.
            steps=options.steps * max(1, options.batch_size // self.batch),
        )


def make_points(batch: int, runs: Sequence[int] = RUNS["cpu"]) -> list[tuple[str, int, Point]]:
    """(axis, value, point); the base is on every axis."""
    base = Point(batch)
    points = []
    for size in (batch // 4, batch // 2, batch, 2 * batch):
        points.append(("batch", size, Point(size)))
    for axis, values in (*AXES.items(), ("runs", runs)):
        field = "size" if axis == "image size" else axis
        for value in values:
            points.append((axis, value, replace(base, **{field: value})))
    return points


def run(options: BenchOptions, console: Console, json_file: Path | None) -> None:
    """Every point in turn."""
    if options.batch_size < 4:
        raise UserError(
            f"--batch-size is {options.batch_size}: "
            "expected at least 4, since a quarter of it is measured"
        )
    runtime, _ = start(options)
    rows: list[BenchRow] = []
    measured: dict[Point, dict[str, BenchRow]] = {}
    for axis, value, point in make_points(options.batch_size, RUNS[runtime.device]):
        too_few = runtime.device != "cpu" and torch.cuda.device_count() < point.processes
        if point.processes > 1 and too_few:
            continue
        if point not in measured:
            console.out(f"{axis} {value}", highlight=False)
            measured[point] = measure_point(point, point.options(options))
        rows.append(make_row(axis, value, measured[point]))
    base = measured[Point(options.batch_size)]["authors"]
    rows.insert(0, BenchRow("authors", base.rates, base.ratios))
    report("sweep", rows, options, runtime, console, json_file)


def make_row(axis: str, value: int, measured: dict[str, BenchRow]) -> BenchRow:
    step, student, teacher = (measured[part] for part in ("step", "student", "teacher"))
    shares = []
    # For each round; an image takes 1 / rate seconds.
    for whole, training, inference in zip(step.rates, student.rates, teacher.rates, strict=True):
        shares.append(1 - whole / training - whole / inference)
    extra: dict[str, object] = {"axis": axis, "value": value}
    for part in ("authors", "student", "teacher"):
        extra[f"{part}_rate"] = measured[part].median
    extra["share"] = median(shares)
    return BenchRow(f"{axis} {value}", step.rates, step.ratios, extra)


def measure_point(point: Point, options: BenchOptions) -> dict[str, BenchRow]:
    """The authors' step, ours, and the parts of ours."""
    device = start(options)[0].device
    # The compiler limits recompilations per function, and counts earlier points.
    torch.compiler.reset()
    measure_ours = _in_this_process
    if point.processes * point.runs > 1:
        measure_ours = _in_several_processes
    with (
        authors_step(options, device, size=point.size) as authors,
        measure_ours(point, options) as ours,
    ):
        return {row.name: row for row in interleave({"authors": authors} | ours, options.rounds)}


@contextmanager
def _in_this_process(point: Point, options: BenchOptions) -> Iterator[dict[str, Measure]]:
    yield make_measures(point, options)


def make_measures(point: Point, options: BenchOptions) -> dict[str, Measure]:
    """The parts of a step in this process, on its share of the batch."""
    runtime, fabric = start(options, devices=point.processes)
    batch = random_batch(options.batch_size // point.processes, fabric.device, point.size)
    method, pairs = "at+kd", f"last{point.pairs}"
    if point.pairs == 0:
        method, pairs = "kd", "auto"
    return {
        "student": measure_step(options, runtime, fabric, batch, "none"),
        "teacher": measure_teacher(options, runtime, fabric, batch[0]),
        "step": measure_step(options, runtime, fabric, batch, method, pairs),
    }


@contextmanager
def _in_several_processes(point: Point, options: BenchOptions) -> Iterator[dict[str, Measure]]:
    """Processes or runs, each on its share of the cores or on its own GPU."""
    context = multiprocessing.get_context("spawn")
    port = free_port()
    pipes, processes = [], []
    for rank in range(point.processes * point.runs):
        pipe, child_pipe = context.Pipe()
        process = context.Process(
            target=_serve, args=(child_pipe, rank, port, point, options), daemon=True
        )
        process.start()
        child_pipe.close()  # otherwise `recv` would wait for a process that died
        pipes.append(pipe)
        processes.append(process)

    def measure(part: str) -> float:
        for pipe in pipes:
            pipe.send(part)
        try:
            rates = [pipe.recv() for pipe in pipes]
        except (EOFError, OSError):
            raise RunError("a process of the sweep died; its message is above") from None
        # Processes wait for the slowest one. The run that ends last has the device alone.
        return point.runs * min(rates)

    try:
        yield {part: partial(measure, part) for part in PARTS}
    finally:
        for process in processes:
            process.kill()
            process.join()


def _serve(pipe: Connection, rank: int, port: int, point: Point, options: BenchOptions) -> None:
    """Process or run `rank`: answers the name of a part with its images/s, of the whole batch."""
    if point.processes > 1:
        os.environ |= torchrun_environment(rank, point.processes, port)
    torch.set_num_threads(max(1, torch.get_num_threads() // (point.processes * point.runs)))
    measures = make_measures(point, options)
    while True:
        if point.processes > 1:
            torch.distributed.barrier()
        pipe.send(measures[pipe.recv()]())


def torchrun_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets on one node, and Fabric reads."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "sweep",
    }


def free_port() -> int:
    """A free port below those that the system gives to other programs meanwhile (32768 and up)."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as candidate, suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return port


if __name__ == "__main__":
    main(__doc__, run, DEFAULTS)
