"""`attention-transfer demo`: a teacher trained on many scenes, and students trained on few.

The students learn alone, with attention transfer, with distillation and with both; all with the
same budget, the same seeds and the same views of the images, so that the teacher runs once for all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .config import Recipe, make_recipe, named_recipe
from .errors import plural
from .launch import run_and_report
from .report import SettingRow, group_runs, print_table, read_run, write_report
from .run_folder import RunFolder

METHODS = ("none", "at", "kd", "at+kd")


def run_demo(out: Path, seeds: int, console: Console) -> list[SettingRow]:
    """Runs the demo into `out`, except for finished runs; returns the rows of its table.

    The table and the report are first made after one seed, because all seeds take some time.
    """
    start = time.monotonic()
    folders = [RunFolder(out / "teacher")]
    teacher = {"command": "train"}
    run_and_report(make_recipe(teacher, named_recipe("digits-teacher")), folders[0], console)
    rows: list[SettingRow] = []
    for seed in range(seeds):
        for method in METHODS:
            recipe = student_recipe(method, out, seed)
            folders.append(RunFolder(out / method / f"seed-{seed}"))
            run_and_report(recipe, folders[-1], console)
        if seed in (0, seeds - 1):
            rows = _show(folders, out / "report.html", console)
            minutes = (time.monotonic() - start) / 60
            console.out(f"{minutes:.1f} min. Curves, costs and attention maps: {out}/report.html")
        if seed == 0 and seeds > 1:
            console.out(
                f"{plural(seeds - 1, 'more seed')} will show the spread. Ctrl-C stops; the same "
                "command continues."
            )
    return rows


def _show(folders: Sequence[RunFolder], report: Path, console: Console) -> list[SettingRow]:
    runs = [read_run(folder) for folder in folders]
    rows = group_runs(runs)
    print_table(rows, console)
    write_report(runs, report)
    return rows


def student_recipe(method: str, out: Path, seed: int) -> Recipe:
    """The recipe of a student whose teacher is in `out`."""
    recipe = named_recipe("digits-student")
    # A view for each epoch: no view is repeated, and the runs of all seeds and methods share the
    # teacher's outputs.
    options = {"command": "distill", "method": method, "seed": seed, "views": recipe["epochs"]}
    if method != "none":
        options |= {"teacher": str(out / "teacher"), "store": str(out / "store")}
    return make_recipe(recipe, options)
