"""A recipe over one or several seeds, each run ending with its report."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from .engine.run import run
from .errors import UserError
from .recipe import Recipe
from .report import read_run, write_report
from .runs import RunFolder


def run_seeds(recipe: Recipe, out: Path, seeds: int, console: Console) -> list[RunFolder]:
    """Runs `recipe` into `out`, or with several seeds into `out/seed-S`, S counting up from the recipe's seed."""
    if seeds > 1 and RunFolder(out).exists:
        raise UserError(f"{out} holds a single run: give the {seeds} seeds another --out")
    folders = []
    for seed in range(recipe.seed, recipe.seed + seeds):
        folder = RunFolder(out if seeds == 1 else out / f"seed-{seed}")
        run_and_report(replace(recipe, seed=seed), folder, console)
        folders.append(folder)
    if seeds > 1 and all(f.finished for f in folders) and os.environ.get("LOCAL_RANK", "0") == "0":
        write_report([read_run(f) for f in folders], out / "report.html")
    return folders


def run_and_report(recipe: Recipe, folder: RunFolder, console: Console) -> dict[str, Any]:
    """One run and its report.html."""
    summary = run(recipe, folder.path, console)
    if summary and not folder.report_file.is_file():
        write_report([read_run(folder)], folder.report_file)
    return summary
