"""`bench compile`: whole runs of the command with compilation off, on and auto.

AT+KD on the built-in images: a long run and a short one, each in a process of its own. The time
includes imports, checks, validation and files. `on first` and `auto` begin with an empty compiler
cache, `on second` with the cache of `on first`. `authors` is their loop with the same number of
steps, including its start. `times_off`: the time relative to `off` of the same length. `built`: the
number of machine code files that a run added to the cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from ..data.images import ImageSet
from ..data.open import open_data
from ..errors import RunError
from ..models.create import create_model
from .authors import authors_step
from .measure import BenchRow, Measure, interleave, median_ratio, report
from .options import BenchOptions
from .workload import start

SHORT = 12  # ratio of the steps of the long run to those of the short one
VALIDATION_IMAGES = 500
MACHINE_CODE = (".so", ".cubin", ".dylib")
AUTO_LIMIT = 1.1  # limit on the time of `auto`, relative to `off`


class CompileCase:
    """One row: a setting of --compile, and the compiler cache of its runs."""

    def __init__(
        self, compile: str, options: BenchOptions, work: Path, earlier: CompileCase | None = None
    ):
        """`work` is a folder with teacher.pt; `earlier` is the case that runs before this one."""
        self.compile, self.options, self.work, self.earlier = compile, options, work, earlier
        self.cache = work
        self.built = 0  # machine code files, maximum over the rounds
        self.compiled = False

    def __call__(self) -> float:
        """Runs the command once; images/s over the whole time of its process."""
        if self.earlier is None:
            self.cache = Path(tempfile.mkdtemp(dir=self.work))
        else:
            self.cache = self.earlier.cache
        files = count_machine_code(self.cache)
        out = Path(tempfile.mkdtemp(dir=self.work)) / "run"
        arguments = command_arguments(self.options, self.compile, self.work)
        command = [sys.executable, "-m", "attention_transfer", *arguments, "--out", str(out)]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(self.cache)}
        start = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            # The last line is the command's error message.
            lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise RunError(f"a run with --compile {self.compile} failed: {lines[-1]}")
        self.built = max(self.built, count_machine_code(self.cache) - files)
        self.compiled |= json.loads((out / "environment.json").read_text())["auto"]["compile"]
        return self.options.steps * self.options.batch_size / seconds


def run(options: BenchOptions, console: Console, json_file: Path | None) -> None:
    """Long runs, then short ones; the notes check the time of `auto` and the compiler's cache."""
    runtime, _ = start(options)
    short = replace(options, steps=max(1, options.steps // SHORT))
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        torch.save(create_model(options.teacher, 10).state_dict(), work / "teacher.pt")
        rows, notes = measure_runs("long", options, runtime.device, work)
        short_rows, short_notes = measure_runs("short", short, runtime.device, work)
    rows[0].name = "authors"
    report("compile", rows + short_rows, options, runtime, console, json_file, notes + short_notes)


def measure_runs(
    length: str, options: BenchOptions, device: str, work: Path
) -> tuple[list[BenchRow], list[str]]:
    """The rows and the checks of runs of one length."""
    off, auto = CompileCase("off", options, work), CompileCase("auto", options, work)
    first = CompileCase("on", options, work)
    second = CompileCase("on", options, work, earlier=first)
    cases = {"off": off, "on first": first, "on second": second, "auto": auto}
    measures: dict[str, Measure] = {"authors": lambda: measure_authors(options, device), **cases}
    # No warm-up: the start of each process and its compilation are part of the time.
    rows = interleave(measures, options.rounds, warm_up=False)
    off_row = rows[1]
    for row in rows:
        row.extra["seconds"] = options.steps * options.batch_size / row.median
        if row.name in cases:
            row.extra["times_off"] = median_ratio(off_row, row)
            row.extra["built"] = cases[row.name].built
        row.name += f" {length}"
    times_off = rows[-1].extra["times_off"]
    choice = "compiled" if auto.compiled else "did not compile"
    verdict = "within" if times_off <= AUTO_LIMIT else "BEYOND"
    reused = "reused" if second.built == 0 < first.built else "NOT REUSED"
    notes = [
        f"auto {length}: {choice}, {times_off:.2f} of off's time: {verdict} {AUTO_LIMIT:.2f}",
        f"cache {length}: {first.built} files built by the first run, {second.built} by the second:"
        f" {reused}",
    ]
    return rows, notes


def command_arguments(options: BenchOptions, compile: str, work: Path) -> list[str]:
    """The arguments of `attention-transfer` for one run, without --out."""
    epochs = -(-options.steps // (options.images // options.batch_size))
    flags = f"""
        --student {options.student} --teacher {options.teacher} --method at+kd --data digits
        --limit-train {options.images} --limit-val {min(VALIDATION_IMAGES, options.images)}
        --batch-size {options.batch_size} --epochs {epochs} --max-steps {options.steps}
        --lr 0.01 --schedule constant --device {options.device} --precision {options.precision}
        --compile {compile}
    """
    # The path may contain spaces.
    return ["distill", "--teacher-weights", str(work / "teacher.pt"), *flags.split()]


def measure_authors(options: BenchOptions, device: str) -> float:
    """Images/s of their loop with its loader, from the start of its process."""
    train = open_data("digits", limit_train=options.images, limit_val=VALIDATION_IMAGES).train
    assert isinstance(train, ImageSet), "the digits are in memory"
    start = time.perf_counter()
    data = (train.images.numpy(), train.labels.numpy())
    with authors_step(options, device, data) as measure:
        measure()
        return options.steps * options.batch_size / (time.perf_counter() - start)


def count_machine_code(folder: Path) -> int:
    return sum(file.suffix in MACHINE_CODE for file in folder.rglob("*"))
