"""A recipe over one or several seeds, each run ending with its report."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .config import Recipe
from .data import prepare_data
from .errors import RunError, UserError
from .report import read_run, write_report
from .run_folder import RunFolder
from .train.run import AT_ONCE, run
from .train.trainer import Interrupted, handling

POLL = 0.3  # seconds
Run = tuple[Any, Connection, RunFolder]


def run_seeds(
    recipe: Recipe, out: Path, seeds: int, console: Console, at_once: int = 1
) -> list[RunFolder]:
    """Runs `recipe` into `out`, or with several seeds into `out/seed-S`, S counting up from the recipe's seed.

    Args:
        at_once: so many seeds at a time, each in a process of its own that has its share of the cores.
    """
    if seeds > 1 and RunFolder(out).exists:
        raise UserError(f"{out} holds a single run: give the {seeds} seeds another --out")
    if at_once > 1 and recipe.devices * recipe.nodes > 1:
        raise UserError(
            f"--at-once is {at_once}: a run of several processes has the machine to itself, expected 1"
        )
    runs = [
        (replace(recipe, seed=seed), RunFolder(out if seeds == 1 else out / f"seed-{seed}"))
        for seed in range(recipe.seed, recipe.seed + seeds)
    ]
    folders = [folder for _, folder in runs]
    if at_once > 1 and seeds > 1:
        _run_at_once(runs, min(at_once, seeds), console)
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


def _run_at_once(runs: list[tuple[Recipe, RunFolder]], count: int, console: Console) -> None:
    """After a run that failed no other is started; those under way end as they would have.

    Raises:
        UserError, RunError: what the first that failed says; the others are said when they fail.
        Interrupted: after a signal, once every run has saved its state.
    """
    waiting, failed = list(runs), list[Exception]()
    running: list[Run] = []
    prepare_data(runs[0][0].data)
    threads = max(1, torch.get_num_threads() // count)
    with (
        _environment(OMP_NUM_THREADS=threads),
        _environment(**{AT_ONCE: count}),
        _signals() as stopped,
    ):
        while running or (waiting and not failed and not stopped()):
            while waiting and not failed and not stopped() and len(running) < count:
                running.append(_start(*waiting.pop(0)))
            ready = wait([pipe for _, pipe, _ in running], POLL)
            for one in [one for one in running if one[1] in ready]:
                running.remove(one)
                if (error := _end(*one, stopped())) is not None:
                    failed.append(error)
                    console.print(f"failed: {error}", markup=False, highlight=False, soft_wrap=True)
            if stopped():  # from a terminal they have it already: a second one changes nothing
                for process, _, _ in running:
                    process.terminate()
        if failed:
            raise failed[0]
        if stopped():
            raise Interrupted


def _start(recipe: Recipe, folder: RunFolder) -> Run:
    context = multiprocessing.get_context("spawn")  # CUDA and OpenMP do not survive a fork
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(recipe, folder, there))
    with handling(
        signal.SIG_IGN, signal.SIGINT
    ):  # which it inherits: until it trains, only SIGTERM ends it
        process.start()
    there.close()
    return process, here, folder


def _end(process: Any, pipe: Connection, folder: RunFolder, stopped: bool) -> Exception | None:
    try:
        kind, text = pipe.recv()
    except EOFError:
        process.join()
        kind, text = (
            (None, "")
            if stopped
            else (RunError, f"its process ended with status {process.exitcode}")
        )
    process.join()
    return None if kind is None else kind(f"{folder}: {text}")


def _serve(recipe: Recipe, folder: RunFolder, pipe: Connection) -> None:
    """A run in a process of its own; what went wrong goes through `pipe`, in one line."""
    console = Console(file=_Labelled(folder.path.name), force_terminal=False)  # type: ignore[arg-type]
    said: tuple[type[Exception] | None, str] = (None, "")
    try:
        run_and_report(recipe, folder, console)
    except (UserError, RunError) as error:
        said = (UserError if isinstance(error, UserError) else RunError), str(error)
    except KeyboardInterrupt:
        pass  # saved
    except Exception as error:
        if os.environ.get("ATTENTION_TRANSFER_TRACEBACK"):
            raise
        first = (str(error).strip().splitlines() or [""])[0][:1000]
        said = (
            RunError,
            f"{type(error).__name__}: {first} (ATTENTION_TRANSFER_TRACEBACK=1 shows where)",
        )
    pipe.send(said)


class _Labelled:
    """Standard output with a word before each line, where several processes share it."""

    def __init__(self, label: str):
        self.label = label

    def write(self, text: str) -> int:
        # In one piece, or another process's line could come between.
        sys.stdout.write(
            "".join(f"{self.label} | {line}" for line in text.splitlines(keepends=True))
        )
        return len(text)

    def flush(self) -> None:
        sys.stdout.flush()


@contextmanager
def _environment(**words: object) -> Iterator[None]:
    """What processes started inside find in their environment, unless the user has said otherwise."""
    new = {name: str(word) for name, word in words.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came meanwhile."""
    came: list[int] = []
    with handling(lambda number, frame: came.append(number), signal.SIGINT, signal.SIGTERM):
        yield lambda: bool(came)
