"""The view of all runs, in a terminal and without one."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from small_runs import small

from attention_transfer.launch import Task
from attention_transfer.run_folder import RunFolder
from attention_transfer.studies.carry_out import RunsProgress

SUMMARY = {
    "final": {"val_accuracy": 0.75, "val_loss": 1.0},
    "epochs": 2,
    "seconds": 60.0,
    "images_per_second": 100.0,
}


@pytest.fixture
def tasks(tmp_path: Path) -> list[Task]:
    folders = [RunFolder(tmp_path / "wrn-10-1" / "none-1" / f"seed-{k}") for k in range(3)]
    for folder in folders:
        folder.path.mkdir(parents=True)
    return [Task(small(epochs=2), folder) for folder in folders]


def carry_on(tasks: list[Task], terminal: bool) -> str:
    """What the view shows of a run that ends, and of one that has done half."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120)
    view = RunsProgress(console, tasks, {task.folder.path: 100.0 for task in tasks})
    with view:
        view.watch(tasks[0], True)
        tasks[0].folder.summary_file.write_text(json.dumps(SUMMARY))
        view.watch(tasks[0], False)
        view.watch(tasks[1], True)
        tasks[1].folder.write_metrics([{"epoch": 1, "val_accuracy": 0.6}])
        view.refresh()
    return stream.getvalue()


def test_in_a_terminal_it_is_a_bar_and_a_line_for_each_run(tasks):
    text = carry_on(tasks, terminal=True)
    assert "1 of 3 runs" in text
    assert "wrn-10-1/none-1/seed-1" in text
    assert "epoch 1/2, 40.00 % error" in text


def test_without_a_terminal_it_is_a_line_for_each_start_and_end(tasks):
    lines = carry_on(tasks, terminal=False).splitlines()
    assert lines == [
        "run 1 of 3: wrn-10-1/none-1/seed-0",
        "wrn-10-1/none-1/seed-0: 25.00 % error, loss 1.000 after 2 epochs, 1.0 min at 100 images/s",
        "run 2 of 3: wrn-10-1/none-1/seed-1",
    ]


def test_runs_are_numbered_by_their_start_also_after_a_failure(tasks):
    stream = io.StringIO()
    console = Console(file=stream, width=120)
    with RunsProgress(console, tasks, {task.folder.path: 100.0 for task in tasks}) as view:
        for task in tasks:
            view.watch(task, True)
            view.watch(task, False)
    lines = stream.getvalue().splitlines()
    assert lines == [f"run {k + 1} of 3: wrn-10-1/none-1/seed-{k}" for k in range(3)]
