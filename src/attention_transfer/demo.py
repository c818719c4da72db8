"""`attention-transfer demo`: the whole story on the built-in data.

A teacher that saw many scenes; students that see few: alone, with attention transfer, with distillation, with both, at
the same budget and with the same seeds. The outcome is printed as it falls.
"""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from .config import make_recipe, named_recipe
from .launch import run_and_report
from .report import group_runs, print_table, read_run, write_report
from .run_folder import RunFolder

# A constant β = 1000, the authors', is for runs of tens of thousands of steps; these have a few hundred.
STUDENTS: dict[str, dict[str, object]] = {
    "none": {},
    "at": {"beta": 100.0},
    "kd": {},
    "at+kd": {"beta": 100.0},  # decays to zero
}


def run_demo(out: Path, seeds: int, console: Console) -> None:
    """Runs the story into `out`; what is finished there is not done again."""
    start = time.monotonic()
    teacher = RunFolder(out / "teacher")
    run_and_report(
        make_recipe({"command": "train"}, named_recipe("digits-teacher")), teacher, console
    )
    folders = [teacher]
    for seed in range(seeds):
        for method, options in STUDENTS.items():
            folder = RunFolder(out / method / f"seed-{seed}")
            words = {"command": "distill", "teacher": str(teacher), "method": method, "seed": seed}
            run_and_report(
                make_recipe(named_recipe("digits-student"), words, options), folder, console
            )
            folders.append(folder)
    runs = [read_run(f) for f in folders]
    print_table(group_runs(runs), console)
    report = out / "report.html"
    write_report(runs, report)
    console.print(
        f"{(time.monotonic() - start) / 60:.1f} min. Curves, costs and attention maps: {report}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
