"""A recipe over one or several seeds, each run ending with its report."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rich.console import Console

from .engine.loop import Interrupted
from .engine.run import run
from .errors import RunError, UserError
from .recipe import Recipe
from .report import read_run, write_report
from .runs import RunFolder


def run_seeds(recipe: Recipe, out: Path, seeds: int, console: Console, at_once: int = 1) -> list[RunFolder]:
    """Runs `recipe` into `out`, or with several seeds into `out/seed-S`, S counting up from the recipe's seed.

    Args:
        at_once: so many seeds at a time, each in a process of its own that has its share of the cores.
    """
    if seeds > 1 and RunFolder(out).exists:
        raise UserError(f"{out} holds a single run: give the {seeds} seeds another --out")
    if at_once > 1 and recipe.devices * recipe.nodes > 1:
        raise UserError(f"--at-once is {at_once}: a run of several processes has the machine to itself, expected 1")
    runs = [
        (replace(recipe, seed=seed), RunFolder(out if seeds == 1 else out / f"seed-{seed}"))
        for seed in range(recipe.seed, recipe.seed + seeds)
    ]
    folders = [folder for _, folder in runs]
    if at_once > 1 and seeds > 1:
        _run_at_once(runs, min(at_once, seeds))
    else:
        for one, folder in runs:
            run_and_report(one, folder, console)
    if seeds > 1 and all(f.finished for f in folders) and os.environ.get("LOCAL_RANK", "0") == "0":
        write_report([read_run(f) for f in folders], out / "report.html")
    return folders


def run_and_report(recipe: Recipe, folder: RunFolder, console: Console) -> dict[str, Any]:
    """One run and its report.html."""
    summary = run(recipe, folder.path, console)
    if summary and not folder.report_file.is_file():
        write_report([read_run(folder)], folder.report_file)
    return summary


def _run_at_once(runs: list[tuple[Recipe, RunFolder]], count: int) -> None:
    """After a run that failed no other is started; those under way end as they would have.

    Raises:
        UserError, RunError: what the first that failed says.
        Interrupted: after a signal, once every run has saved its state.
    """
    waiting, failed = list(runs), list[Exception]()
    running: dict[Any, tuple[Any, Connection, RunFolder]] = {}
    with _threads(max(1, (os.cpu_count() or 1) // count)), _terminating(running):
        try:
            while running or (waiting and not failed):
                while waiting and not failed and len(running) < count:
                    _start(*waiting.pop(0), running)
                for sentinel in wait(list(running)):
                    failed += _end(*running.pop(sentinel))
        except KeyboardInterrupt:
            for process, _, _ in running.values():  # each has the signal too, and saves
                process.join()
            raise Interrupted from None
    if failed:
        raise failed[0]


def _start(recipe: Recipe, folder: RunFolder, running: dict[Any, tuple[Any, Connection, RunFolder]]) -> None:
    context = multiprocessing.get_context("spawn")  # CUDA and OpenMP do not survive a fork
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(recipe, folder, there))
    process.start()
    there.close()
    running[process.sentinel] = process, here, folder


def _end(process: Any, pipe: Connection, folder: RunFolder) -> list[Exception]:
    process.join()
    try:
        kind, text = pipe.recv()
    except EOFError:
        kind, text = RunError, f"its process ended with status {process.exitcode}"
    return [] if kind is None else [kind(f"{folder}: {text}")]


def _serve(recipe: Recipe, folder: RunFolder, pipe: Connection) -> None:
    """A run in a process of its own; what went wrong goes through `pipe`."""
    console = Console(file=_Labelled(folder.path.name), force_terminal=False)  # type: ignore[arg-type]
    try:
        run_and_report(recipe, folder, console)
    except (UserError, RunError) as error:
        pipe.send((type(error), str(error)))
    except KeyboardInterrupt as stop:
        pipe.send((RunError, str(stop) or "interrupted"))
    except Exception as error:
        pipe.send((RunError, f"{type(error).__name__}: {error}"))
        if os.environ.get("ATTENTION_TRANSFER_TRACEBACK"):
            raise
    else:
        pipe.send((None, ""))


class _Labelled:
    """Standard output with a word before each line, where several processes share it."""

    def __init__(self, label: str):
        self.label = label

    def write(self, text: str) -> int:
        # In one piece, or another process's line could come between.
        sys.stdout.write("".join(f"{self.label} │ {line}" for line in text.splitlines(keepends=True)))
        return len(text)

    def flush(self) -> None:
        sys.stdout.flush()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """What processes started inside take for the number of cores, unless the user has said."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", str(count))
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]


@contextmanager
def _terminating(running: dict[Any, tuple[Any, Connection, RunFolder]]) -> Iterator[None]:
    """Hands SIGTERM on to the processes; Ctrl-C they get from the terminal themselves."""

    def stop(number: int, frame: Any) -> None:
        for process, _, _ in running.values():
            process.terminate()
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)
