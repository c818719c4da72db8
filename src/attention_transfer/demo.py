"""`attention-transfer demo`: a teacher that saw many scenes, and students that see few.

The students learn alone, with attention transfer, with distillation and with both; all with the
same budget and the same seeds.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from .config import make_recipe, named_recipe
from .launch import run_and_report
from .report import group_runs, print_table, read_run, write_report
from .run_folder import RunFolder

# β of results/demo.md; its runs are older than `auto`.
STUDENTS: dict[str, dict[str, Any]] = {
    "none": {},
    "at": {"beta": 100.0},
    "kd": {},
    "at+kd": {"beta": 100.0},  # decays to zero
}


def run_demo(out: Path, seeds: int, console: Console) -> None:
    """Runs the demo into `out`, without the runs that are finished there."""
    start = time.monotonic()
    folders = [RunFolder(out / "teacher")]
    teacher = {"command": "train"}
    run_and_report(make_recipe(teacher, named_recipe("digits-teacher")), folders[0], console)
    for seed in range(seeds):
        for method in STUDENTS:
            student = student_options(method, str(folders[0])) | {"seed": seed}
            recipe = make_recipe(named_recipe("digits-student"), student)
            folders.append(RunFolder(out / method / f"seed-{seed}"))
            run_and_report(recipe, folders[-1], console)
    runs = [read_run(folder) for folder in folders]
    print_table(group_runs(runs), console)
    report = out / "report.html"
    write_report(runs, report)
    minutes = (time.monotonic() - start) / 60
    text = f"{minutes:.1f} min. Curves, costs and attention maps: {report}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def student_options(method: str, teacher: str) -> dict[str, Any]:
    """The options of one of the `STUDENTS`, over the recipe of all."""
    options = {"command": "distill", "method": method, **STUDENTS[method]}
    if method != "none":
        options["teacher"] = teacher
    return options
