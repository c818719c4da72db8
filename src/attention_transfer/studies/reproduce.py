"""`reproduce`: plans and carries out runs, and prints the table with the paper's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import RunError, plural
from ..outputs import write_numbers
from ..report.formats import model_name
from ..run_folder import remove_partial_files
from ..run_lock import RunLock
from ..trust import check_trusted
from .carry_out import carry_out, check_runs
from .changed import changes_of_table
from .measure import Speed, run_seconds
from .options import PlanOptions, ReproduceOptions
from .plan import Plan, make_plan
from .publish import check_table_files, publish, table_files
from .render import REPRODUCTION
from .results import table_data
from .table_file import chosen_rows, read_table

# A checkpoint holds weights and momentum, student.safetensors the weights: 4 bytes each.
BYTES_A_PARAMETER = 12
RUN_BYTES = 1_500_000  # maps, report and other files


def reproduce(options: ReproduceOptions, changes: Mapping[str, Any], console: Console) -> None:
    """Carries out, or continues, the runs of a table of the paper, and prints it.

    Args:
        changes: recipe keys that override those of the table.

    Raises:
        UserError: for an unknown table or row, and for options that contradict each other.
        RunError: at the end, if runs failed.
    """
    table = read_table(options.table)
    rows = chosen_rows(table, options.rows)
    for row in rows:
        for network in filter(None, (row.student, row.teacher)):
            check_trusted(options.table, network, bool(changes.get("trust_code")))
    plan = make_plan(table, rows, options.seeds, options.out, options.data, changes)
    changed = changes_of_table(table, options, changes)
    stem = options.out / changed.stem(Path(options.table).stem)
    lines_file, text_file, page_file, _ = table_files(stem)
    check_table_files([lines_file, text_file, page_file], options.force)
    if not carry_out_plan(plan, options, console):
        return
    data = table_data(plan, changed)
    publish(data, REPRODUCTION, stem, console, options.json)
    check_complete(plan)


def carry_out_plan(plan: Plan, options: PlanOptions, console: Console) -> bool:
    """Prints the plan and carries it out; False after a dry run.

    Raises:
        UserError: if another process carries out a plan in the same folder.
    """
    with RunLock(plan.root):
        remove_partial_files(plan.root)
        check_runs(plan.tasks.values())
        recipes = {str(path): task.recipe for path, task in plan.tasks.items()}
        measured: dict[Path, tuple[float, Speed]] = {}
        if plan.unfinished:
            with console.status("measuring a few steps of each kind of run"):
                measured = run_seconds(
                    plan.unfinished, recipes, options.jobs, plan.root / "measured.json"
                )
        numbers = plan_numbers(plan, measured, options.jobs)
        for line in describe_plan(numbers):
            console.out(line)
        if options.dry_run:
            write_numbers(options.json, numbers)
            return False
        seconds = {path: estimate for path, (estimate, _) in measured.items()}
        plan.errors = carry_out(plan.unfinished, seconds, options.jobs, console)
        return True


def plan_numbers(
    plan: Plan, measured: Mapping[Path, tuple[float, Speed]], jobs: int
) -> dict[str, Any]:
    """The number of runs of each kind, their time and their size on disk."""
    tasks = list(plan.tasks.values())
    kinds: dict[str, list[float]] = {}
    for task in plan.unfinished:
        kind = f"{model_name(task.recipe.model)} {task.recipe.method}".removesuffix(" none")
        kinds.setdefault(kind, []).append(measured[task.folder.path][0])
    stores = {task.recipe.store for task in plan.unfinished} - {None}
    size = sum(RUN_BYTES + BYTES_A_PARAMETER * speed.parameters for _, speed in measured.values())
    return {
        "title": plan.title,
        "folder": str(plan.root),
        "runs": len(tasks),
        "finished": len(tasks) - len(plan.unfinished),
        "to_continue": sum(task.folder.exists for task in plan.unfinished),
        "kinds": [
            {"kind": kind, "runs": len(seconds), "seconds": sum(seconds)}
            for kind, seconds in kinds.items()
        ],
        "jobs": jobs,
        "seconds": sum(seconds for seconds, _ in measured.values()) / jobs,
        "bytes": size,
        "stores": len(stores),
    }


def describe_plan(plan: Mapping[str, Any]) -> list[str]:
    """Describes the result of `plan_numbers` in text lines."""
    to_do = plan["runs"] - plan["finished"] - plan["to_continue"]
    lines = [
        f"{plan['title']}: {plural(plan['runs'], 'run')} in {plan['folder']}; {plan['finished']} "
        f"finished, {plan['to_continue']} to continue, {to_do} to do"
    ]
    for kind in plan["kinds"]:
        lines.append(f"  {kind['kind']}: {plural(kind['runs'], 'run')}, {hours(kind['seconds'])}")
    if plan["kinds"]:
        lines.append(
            f"about {hours(plan['seconds'])} on this machine, {plan['jobs']} at a time, estimated "
            f"from a few eager steps of each kind (continued runs counted in full); "
            f"{plan['bytes'] / 1e6:,.0f} MB of disk"
        )
        if plan["stores"]:
            lines[-1] += f" and {plural(plan['stores'], 'store')} of teachers' outputs"
    return lines


def hours(seconds: float) -> str:
    if seconds < 3600:
        return plural(max(1, round(seconds / 60)), "minute")
    return f"{seconds / 3600:.1f} hours"


def check_complete(plan: Plan) -> None:
    """Raises `RunError` if runs failed."""
    if not plan.errors:
        return
    left = len(plan.unfinished)
    first = next(iter(plan.errors.values()))
    raise RunError(
        f"{left} of {plural(len(plan.tasks), 'run')} are not finished; the first error: {first}"
    )
