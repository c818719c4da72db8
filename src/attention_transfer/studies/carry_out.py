"""Carries out the runs of a plan, and shows their progress."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..console import make_console
from ..errors import UserError
from ..launch import Task, attempt, run_tasks
from ..train.finish import describe_summary
from ..train.resume import check_finished


def check_runs(tasks: Iterable[Task]) -> None:
    """Raises `UserError` if a task's folder holds another finished run.

    Unfinished runs are checked when they continue.
    """
    for task in tasks:
        if task.folder.finished:
            check_finished(task.folder, task.recipe)


def carry_out(
    tasks: Sequence[Task], seconds: Mapping[Path, float], jobs: int, console: Console
) -> dict[Path, Exception]:
    """Carries out tasks, `jobs` at the same time; returns the errors by folder.

    A task starts after the tasks that it needs. After an error the other tasks continue.

    Args:
        seconds: the estimated time of each run, for the progress bar.

    Raises:
        Interrupted: after a signal, once every run has saved its state.
    """
    view = RunsProgress(console, tasks, seconds)
    with view:
        if jobs > 1:
            return run_tasks(tasks, jobs, console, keep_going=True, watch=view.watch)
        errors: dict[Path, Exception] = {}
        for task in tasks:
            if not task.is_ready:
                continue  # a run that it needs has failed
            view.watch(task, True)
            error = _run_here(task)
            view.watch(task, False)
            if error is not None:
                errors[task.folder.path] = error
                view.say(f"failed: {error}")
        return errors


def _run_here(task: Task) -> Exception | None:
    """Carries out a run in this process; its output goes into its log."""
    assert task.log is not None, "a planned run has a log"
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with open(task.log, "a", buffering=1, encoding="utf-8") as log:
        return attempt(task, make_console(log))


def task_name(task: Task) -> str:
    """`wrn-16-1/at-3f2a91c4/seed-0`: the path of the run's folder, and of its log."""
    return "/".join(task.folder.path.parts[-3:])


class RunsProgress(Progress):
    """A progress bar for all runs and a line for each active run; without a terminal, a line each
    time a run starts or ends."""

    def __init__(self, console: Console, tasks: Sequence[Task], seconds: Mapping[Path, float]):
        self._seconds = {task.folder.path: seconds[task.folder.path] for task in tasks}
        self._running: dict[Path, tuple[Task, TaskID]] = {}
        self._started = 0
        self._ended: list[Path] = []
        self._count = len(tasks)
        # Set before `Progress.__init__`, which already calls `get_renderables`.
        self._all_runs: TaskID | None = None
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[state]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=1,
            disable=not console.is_terminal,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        total = sum(self._seconds.values())
        self._all_runs = self.add_task("all runs", total=total, state=self._state())

    def _state(self) -> str:
        return f"{len(self._ended)} of {self._count} runs"

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        self.console.out(text)

    def watch(self, task: Task, is_running: bool) -> None:
        """Records that a run has started or ended."""
        folder = task.folder
        if is_running:
            line = self.add_task(f"  {task_name(task)}", total=1.0, state="")
            self._running[folder.path] = task, line
            self._started += 1
            if self.disable:
                self.say(f"run {self._started} of {self._count}: {task_name(task)}")
            return
        _, line = self._running.pop(folder.path)
        self.remove_task(line)
        summary = folder.summary()
        if summary is not None:
            self._ended.append(folder.path)
            self.say(f"{task_name(task)}: {describe_summary(task.folder, summary)}")

    def get_renderables(self) -> Iterable[Any]:
        # Called at each refresh, to read what the runs have written.
        if self._all_runs is not None:
            self._read_progress()
        yield from super().get_renderables()

    def _read_progress(self) -> None:
        done = sum(self._seconds[path] for path in self._ended)
        for path, (task, line) in list(self._running.items()):
            rows: list[dict[str, Any]] = []
            with suppress(UserError):  # a damaged file: the run itself reports it
                rows = task.folder.metrics()
            if rows:
                share = rows[-1]["epoch"] / task.recipe.epochs
                error = 100 * (1 - rows[-1]["val_accuracy"])
                state = f"epoch {rows[-1]['epoch']}/{task.recipe.epochs}, {error:.2f} % error"
                self.update(line, completed=share, state=state)
                done += share * self._seconds[path]
        assert self._all_runs is not None
        self.update(self._all_runs, completed=done, state=self._state())
