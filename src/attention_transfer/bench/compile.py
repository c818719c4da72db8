"""`bench compile`: whole runs of the command with compilation off, on and left to it, from its start to its end.

AT+KD on the built-in images: a short run (a twelfth of `--steps`) and a long one, each a process of its own that is
timed with its imports, checks, validation and files. `on first` begins with an empty compiler cache and `on second`
finds what that one left; `auto` begins with an empty one, too. `authors` is their loop for as many steps, with its
start. `times_off` is the time over that of `off` of the same length; `built` the machine code files added to the cache.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..data import ImageSet
from ..errors import RunError
from ..models import create_model
from ..runtime.process import set_up_process
from ..runtime.resolve import resolve_runtime
from ..train.assemble import assemble
from .authors import AuthorsStep
from .measure import Row, Timed, interleave, ratios, report
from .speed import Settings, about, elsewhere, recipe_of

SHORT = 12  # the long run is so many times the short one
VALIDATION_IMAGES = 500
MACHINE_CODE = (".so", ".cubin", ".dylib")
AUTO_LIMIT = 1.1  # what `auto` may cost at most, over `off`


class Case:
    """One row: a mode of compilation, a number of steps, and the compiler cache that it works with."""

    def __init__(
        self,
        name: str,
        mode: str,
        steps: int,
        settings: Settings,
        work: Path,
        after: Case | None = None,
    ):
        self.name, self.mode, self.steps = name, mode, steps
        self.settings, self.work, self.after = settings, work, after
        self.cache = work
        self.built: list[int] = []
        self.compiled: list[bool] = []

    def __call__(self) -> float:
        """Runs the command once; images/s over its whole life."""
        # `after` ran before in this round, and left its cache.
        self.cache = self.after.cache if self.after else Path(tempfile.mkdtemp(dir=self.work))
        before = _machine_code(self.cache)
        out = Path(tempfile.mkdtemp(dir=self.work)) / "run"
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(self.cache)}
        start = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "attention_transfer",
            *words(self.settings, self.mode, self.steps, self.work),
        ]
        done = subprocess.run(
            [*command, "--out", str(out)], env=environment, capture_output=True, text=True
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise RunError(
                f"the run of {self.name!r} failed: {said[-1] if said else f'status {done.returncode}'}"
            )
        self.built.append(_machine_code(self.cache) - before)
        self.compiled.append(json.loads((out / "environment.json").read_text())["auto"]["compile"])
        return self.steps * self.settings.batch_size / seconds


def bench_compile(settings: Settings, console: Console, file: Path | None) -> None:
    """Short and long runs in turn, round after round; says whether `auto` and the cache keep their promises."""
    runtime = set_up_process(resolve_runtime(recipe_of(settings, "at+kd")))
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        torch.save(create_model(settings.teacher, 10).state_dict(), work / "teacher.pt")
        data = _images(settings, work)
        cases: dict[str, Case] = {}
        timed: dict[str, Timed] = {}
        for length, steps in (("long", settings.steps), ("short", max(1, settings.steps // SHORT))):
            name = "authors" if length == "long" else "authors short"
            timed[name] = partial(_authors, replace(settings, steps=steps), runtime.device, data)
            for mode, after in (
                ("off", None),
                ("on first", None),
                ("on second", "on first"),
                ("auto", None),
            ):
                first = cases[f"{after} {length}"] if after else None
                case = Case(f"{mode} {length}", mode.split()[0], steps, settings, work, first)
                timed[case.name] = cases[case.name] = case
        against = {name: "authors short" for name in timed if name.endswith("short")}
        rows = interleave(timed, settings.rounds, against)
    by_name = {row.name: row for row in rows}
    for row in rows:
        steps = (
            cases[row.name].steps
            if row.name in cases
            else settings.steps // (SHORT if "short" in row.name else 1)
        )
        _add(row, max(1, steps) * settings.batch_size, by_name, cases)
    report("compile", rows, about(settings, runtime), console, file, promises(by_name, cases))


def _add(row: Row, images: int, by_name: dict[str, Row], cases: dict[str, Case]) -> None:
    row.more["seconds"] = images / row.to_dict()["median"]
    if row.name in cases:
        off = by_name[f"off {row.name.split()[-1]}"]
        row.more["times_off"] = statistics.median(ratios(off.rates, row.rates))
        row.more["built"] = max(cases[row.name].built)


def promises(rows: dict[str, Row], cases: dict[str, Case]) -> list[str]:
    """One line each: what `auto` costs over `off`, and what a second run builds anew."""
    said = []
    for length in ("short", "long"):
        auto = rows[f"auto {length}"].more["times_off"]
        chose = "compiled" if any(cases[f"auto {length}"].compiled) else "did not compile"
        kept = "within" if auto <= AUTO_LIMIT else "BEYOND"
        said.append(f"auto {length}: {chose}, {auto:.2f} of off's time: {kept} {AUTO_LIMIT:.2f}")
        first, second = (
            rows[f"on {which} {length}"].more["built"] for which in ("first", "second")
        )
        reused = "reused" if second == 0 < first else "NOT REUSED"
        said.append(
            f"cache {length}: {first} files built by the first run, {second} by the second: {reused}"
        )
    return said


def words(settings: Settings, mode: str, steps: int, work: Path) -> list[str]:
    """The command's words of one run."""
    options = {
        "student": settings.student,
        "teacher": settings.teacher,
        "teacher-weights": work / "teacher.pt",
        "method": "at+kd",
        "data": "digits",
        "limit-train": settings.images,
        "limit-val": min(VALIDATION_IMAGES, settings.images),
        "batch-size": settings.batch_size,
        "epochs": -(-steps // max(1, settings.images // settings.batch_size)),
        "max-steps": steps,
        "lr": 0.01,
        "schedule": "constant",
        "device": settings.device,
        "precision": settings.precision,
        "compile": mode,
    }
    return [
        "distill",
        *(str(word) for key, value in options.items() for word in (f"--{key}", value)),
    ]


def _authors(settings: Settings, device: str, data: Any) -> float:
    """Their loop with its loader, from the start of its process."""
    start = time.perf_counter()
    with elsewhere(
        partial(AuthorsStep, settings.student, settings.teacher), settings, device, data, warm=False
    ) as run:
        run()
        return settings.steps * settings.batch_size / (time.perf_counter() - start)


def _images(settings: Settings, work: Path) -> tuple[Any, Any]:
    recipe = replace(recipe_of(settings, "at+kd"), teacher_weights=str(work / "teacher.pt"))
    train = assemble(recipe).data.train
    assert isinstance(train, ImageSet), "the digits are in memory"
    return train.images.cpu().numpy(), train.labels.cpu().numpy()


def _machine_code(folder: Path) -> int:
    return sum(file.suffix in MACHINE_CODE for file in folder.rglob("*"))
