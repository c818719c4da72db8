"""Runs a recipe with one or several seeds, and writes the reports."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .config import Recipe
from .console import make_console
from .data.open import prepare_data
from .errors import RunError, UserError, describe_unknown
from .report import read_run, save_run_maps, write_report
from .run_folder import RunFolder
from .runtime.process import end_with_parent
from .runtime.ranks import global_rank, resolve_processes
from .train.run import run
from .train.signals import Interrupted, interrupt, signal_handlers

POLL_SECONDS = 0.3  # time between checks for a signal while jobs run


def run_seeds(
    recipe: Recipe, out: Path, seeds: int, console: Console, jobs: int = 1
) -> list[RunFolder]:
    """Runs `recipe` into `out`, or several seeds into `out/seed-S`, S from the recipe's seed on.

    Args:
        jobs: number of seeds that run at the same time, each in a process with its share of cores.

    Raises:
        UserError, RunError: from the first run that failed. Runs that have started are finished,
            and no other run is started.
        Interrupted: after a signal, once every run has saved its state.
    """
    if seeds > 1 and RunFolder(out).exists:
        raise UserError(f"{out} holds a single run: give the {seeds} seeds another --out")
    if jobs > 1 and math.prod(resolve_processes(recipe)) > 1:
        raise UserError(
            f"--jobs is {jobs}: a run of several processes uses the whole machine, expected 1"
        )
    if jobs > 1 and seeds == 1:
        raise UserError(f"--jobs is {jobs}, but there is one run: add --seeds, or leave --jobs out")
    runs = [(recipe, RunFolder(out))]
    if seeds > 1:
        recipes = [replace(recipe, seed=recipe.seed + k) for k in range(seeds)]
        runs = [(r, RunFolder(out / f"seed-{r.seed}")) for r in recipes]
    if jobs > 1:
        errors = run_tasks([Task(*pair) for pair in runs], min(jobs, seeds), console)
        if errors:
            raise next(iter(errors.values()))
    else:
        for seed_recipe, folder in runs:
            run_and_report(seed_recipe, folder, console)
    folders = [folder for _, folder in runs]
    if seeds > 1 and global_rank() == 0 and all(folder.finished for folder in folders):
        write_report([read_run(folder) for folder in folders], out / "report.html")
    return folders


def run_and_report(
    recipe: Recipe, folder: RunFolder, console: Console, jobs: int = 1
) -> dict[str, Any]:
    """One run and its report.html; returns the summary."""
    summary = run(recipe, folder.path, console, jobs, save_run_maps)
    if summary and global_rank() == 0 and not folder.report_file.is_file():
        write_report([read_run(folder)], folder.report_file)
    return summary


@dataclass(frozen=True)
class Task:
    """A run to carry out.

    `after` are the runs that must be finished before it starts. `log` is the file for the output of
    the run; by default it is printed to standard output.
    """

    recipe: Recipe
    folder: RunFolder
    after: tuple[RunFolder, ...] = ()
    log: Path | None = None

    @property
    def is_ready(self) -> bool:
        return all(folder.finished for folder in self.after)


def attempt(task: Task, console: Console, jobs: int = 1) -> Exception | None:
    """Carries out a run; returns its error, which names the folder, or None."""
    try:
        run_and_report(task.recipe, task.folder, console, jobs)
    except (UserError, RunError) as error:
        return type(error)(f"{task.folder}: {error}")
    except Exception as error:  # one run must not end the others
        return RunError(f"{task.folder}: {describe_unknown(error)}")
    return None


@dataclass
class Job:
    """A run in its own process. (An executor of concurrent.futures would end all of its processes
    when one dies, and does not handle signals.)"""

    task: Task
    process: Any
    pipe: Connection  # receives the run's error, or None

    @property
    def was_stopped(self) -> bool:
        """Whether a signal ended the run, which has saved its state. Call `result` first."""
        return not self.task.folder.finished

    def result(self) -> Exception | None:
        """Waits for the end of the run; returns its error, or None (also for a stopped run)."""
        error: Exception | None
        try:
            error = self.pipe.recv()
        except EOFError:
            self.process.join()
            status = self.process.exitcode
            error = RunError(f"{self.task.folder}: its process ended with status {status}")
        self.process.join()
        return error


def submit(task: Task, jobs: int, threads: int) -> Job:
    """Starts a run that shares this machine with `jobs` - 1 others."""
    context = multiprocessing.get_context("spawn")  # CUDA and OpenMP do not survive a fork
    receiver, sender = context.Pipe(duplex=False)
    arguments = (task, jobs, threads, os.getpid(), sender)
    process = context.Process(target=_work, args=arguments)
    # The process inherits this handler: Ctrl-C is sent to it as well, and must not end it before it
    # can save.
    with signal_handlers(signal.SIG_IGN, signal.SIGINT):
        process.start()
    sender.close()  # so that the end of the process ends the pipe
    return Job(task, process, receiver)


def run_tasks(
    tasks: Sequence[Task],
    jobs: int,
    console: Console,
    keep_going: bool = False,
    watch: Callable[[Task, bool], None] = lambda task, is_running: None,
) -> dict[Path, Exception]:
    """Carries out tasks in processes, `jobs` at the same time; returns the errors by folder.

    Args:
        keep_going: whether other tasks are started after an error. A task whose `after` failed is
            never started.
        watch: called with a task and True when it starts, and with False when it has ended.

    Raises:
        Interrupted: after a signal to this process or to one of a run, once every run has ended or
            saved its state.
    """
    waiting = list(tasks)
    running: list[Job] = []
    errors: dict[Path, Exception] = {}
    signals: list[int] = []
    stopped = False
    for data in dict.fromkeys(task.recipe.data for task in tasks):
        prepare_data(data)  # once, not in each process
    threads = max(1, torch.get_num_threads() // jobs)

    def startable() -> list[Task]:
        if signals or (errors and not keep_going):
            return []
        return [task for task in waiting if task.is_ready][: jobs - len(running)]

    with signal_handlers(lambda number, _: signals.append(number), signal.SIGINT, signal.SIGTERM):
        while True:
            for task in startable():
                waiting.remove(task)
                running.append(submit(task, jobs, threads))
                watch(task, True)
            if not running:
                break
            ready = wait([job.pipe for job in running], POLL_SECONDS)
            for job in [job for job in running if job.pipe in ready]:
                running.remove(job)
                error = job.result()
                watch(job.task, False)
                stopped = stopped or (error is None and job.was_stopped)
                # A run that this process has terminated did not fail.
                if error is not None and not (signals and job.process.exitcode):
                    errors[job.task.folder.path] = error
                    console.out(f"failed: {error}")
            if signals:
                for job in running:
                    # No effect on a run that has already stopped after Ctrl-C.
                    job.process.terminate()
    if (signals or stopped) and (keep_going or not errors):
        raise Interrupted
    return errors


def _work(task: Task, jobs: int, threads: int, parent: int, pipe: Connection) -> None:
    """The process of a job: sends its error, or None, through `pipe` to its parent."""
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that this one starts
        torch.set_num_threads(threads)
    stdout: Any = _LabelledStdout(task.folder.path.name)
    if task.log is not None:
        task.log.parent.mkdir(parents=True, exist_ok=True)
        # Not closed: the process ends with the run.
        stdout = open(task.log, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
    error: Exception | None = None
    with suppress(KeyboardInterrupt):  # the state is saved
        signal.signal(signal.SIGTERM, interrupt)
        end_with_parent(parent)
        error = attempt(task, make_console(stdout), jobs)
    with suppress(BrokenPipeError):  # the parent may have ended
        pipe.send(error)


class _LabelledStdout:
    """Standard output with the name of the run before each line."""

    def __init__(self, label: str):
        self.label = label

    def write(self, text: str) -> int:
        lines = [f"{self.label} | {line}" for line in text.splitlines(keepends=True)]
        # One write, so that lines of other processes do not come between.
        sys.stdout.write("".join(lines))
        return len(text)

    def flush(self) -> None:
        sys.stdout.flush()
