"""`reproduce`: a plan of runs, the runs that are left, and the table beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import RunError, plural
from ..models.create import check_trusted
from ..report.formats import model_name
from ..run_folder import replacing
from .carry_out import carry_out
from .measure import Speed, run_seconds
from .options import SMALLER, LotOptions, ReproduceOptions
from .plan import Entry, Plan, make_plan
from .render import REPRODUCTION, markdown_page, notes, text_table
from .summaries import Cell, TableData, merge_lines, summarize, write_table_data
from .table_file import TEACHER, Row, chosen_rows, read_table

# A checkpoint holds weights and momentum, student.safetensors the weights: 4 bytes each.
BYTES_A_PARAMETER = 12
RUN_BYTES = 1_500_000  # maps, report and the rest


def reproduce(options: ReproduceOptions, changes: Mapping[str, Any], console: Console) -> None:
    """Carries out, or continues, the runs of a table of the paper, and prints it.

    Args:
        changes: recipe keys over those of the table.

    Raises:
        UserError: for an unknown table or row, and for options that do not go together.
        RunError: at the end, if runs failed.
    """
    table = read_table(options.table)
    rows = chosen_rows(table, options.rows)
    for row in rows:
        for network in filter(None, (row.student, row.teacher)):
            check_trusted(options.table, network, bool(changes.get("trust_code")))
    plan = make_plan(table, rows, options.seeds, options.out, options.data, changes)
    if not carry_out_plan(plan, options, console):
        return
    small = {key: changes[key] for key in SMALLER if key in changes}
    data = table_data(plan, small)
    name = "-".join([Path(options.table).stem, *(f"{k}={v}" for k, v in small.items())])
    print_and_write(data, REPRODUCTION, options.out / name, console)
    check_complete(plan)


def carry_out_plan(plan: Plan, options: LotOptions, console: Console) -> bool:
    """Prints the plan and carries it out; False after a dry run."""
    recipes = {str(path): task.recipe for path, task in plan.tasks.items()}
    measured: dict[Path, tuple[float, Speed]] = {}
    if plan.unfinished:
        text = "measuring a few steps of each kind of run"
        with console.status(text):
            measured = run_seconds(
                plan.unfinished, recipes, options.jobs, plan.root / "measured.json"
            )
    for line in describe_plan(plan, measured, options.jobs):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if options.dry_run:
        return False
    seconds = {path: estimate for path, (estimate, _) in measured.items()}
    plan.errors = carry_out(plan.unfinished, seconds, options.jobs, console)
    return True


def describe_plan(plan: Plan, measured: Mapping[Path, tuple[float, Speed]], jobs: int) -> list[str]:
    """Runs, hours and disk, in words."""
    tasks = list(plan.tasks.values())
    finished = len(tasks) - len(plan.unfinished)
    begun = sum(task.folder.exists for task in plan.unfinished)
    lines = [
        f"{plan.title}: {plural(len(tasks), 'run')} in {plan.root}; {finished} finished, "
        f"{begun} to continue, {len(tasks) - finished - begun} to do"
    ]
    kinds: dict[str, list[float]] = {}
    for task in plan.unfinished:
        kind = f"{model_name(task.recipe.model)} {task.recipe.method}".removesuffix(" none")
        kinds.setdefault(kind, []).append(measured[task.folder.path][0])
    for kind, seconds in kinds.items():
        lines.append(f"  {kind}: {plural(len(seconds), 'run')}, {hours(sum(seconds))}")
    if measured:
        total = sum(seconds for seconds, _ in measured.values()) / jobs
        size = sum(
            RUN_BYTES + BYTES_A_PARAMETER * speed.parameters for _, speed in measured.values()
        )
        lines.append(
            f"about {hours(total)} on this machine, {jobs} at a time, by a few eager steps of "
            f"each kind (runs that continue counted in full); {size / 1e6:,.0f} MB of disk"
        )
    return lines


def hours(seconds: float) -> str:
    if seconds < 3600:
        return plural(max(1, round(seconds / 60)), "minute")
    return f"{seconds / 3600:.1f} hours"


def table_data(plan: Plan, small: Mapping[str, Any], **head: Any) -> TableData:
    """What the finished runs of a plan measured, by cell."""
    title = plan.title
    if small:
        changes = ", ".join(f"{key.replace('_', '-')} {value}" for key, value in small.items())
        title += f" (made small: {changes})"
    described = {"title": title, "metrics": list(plan.metrics), "source": plan.source} | head
    return TableData(described, [_cell(plan, entry) for entry in plan.entries])


def _cell(plan: Plan, entry: Entry) -> Cell:
    folders = {folder.path: folder for folder in entry.folders}
    if entry.setting == TEACHER:
        # Where the teacher is another row's student alone, all seeds of that count.
        (path,) = folders
        for other in plan.entries:
            paths = [folder.path for folder in other.folders]
            if path in paths:
                folders |= {folder.path: folder for folder in other.folders}
    lines = merge_lines(summarize(folder) for folder in folders.values())
    return Cell(
        row_title(entry.row),
        entry.setting,
        lines,
        entry.published,
        entry.confirmed,
        planned=len(folders),
    )


def row_title(row: Row) -> str:
    """`WRN-16-2 → WRN-16-1`, after the row's own name if it has one."""
    title = model_name(row.student)
    if row.teacher is not None:
        title = f"{model_name(row.teacher)} → {title}"
    return f"{row.name}: {title}" if row.name else title


def print_and_write(data: TableData, columns: Sequence[str], stem: Path, console: Console) -> None:
    """Prints a table, and writes it as text, as Markdown and as JSON lines beside its runs."""
    text = text_table(data, columns).for_terminal(data.title)
    console.print(text)
    for note in notes(data):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    files = [stem.with_name(stem.name + suffix) for suffix in (".txt", ".md", ".jsonl")]
    with replacing(files[0]) as partial, open(partial, "w") as stream:
        page = Console(file=stream, width=160)
        page.print(text)
        for note in notes(data):
            page.print(note, markup=False, highlight=False, soft_wrap=True)
    with replacing(files[1]) as partial:
        partial.write_text(markdown_page(data, columns))
    write_table_data(files[2], data)
    names = ", ".join(str(file) for file in files)
    console.print(f"written: {names}", markup=False, highlight=False, soft_wrap=True)


def check_complete(plan: Plan) -> None:
    """Raises `RunError` if runs failed."""
    if not plan.errors:
        return
    left = len(plan.unfinished)
    first = next(iter(plan.errors.values()))
    raise RunError(f"{left} of {plural(len(plan.tasks), 'run')} are not finished; first: {first}")
