"""The results of a plan: its finished runs by row and setting."""

from __future__ import annotations

from typing import Any

from ..report.formats import model_name
from .changed import Changes
from .plan import Entry, Plan
from .summaries import Cell, Line, TableData, merge_lines, summarize
from .table_file import TEACHER, Row


def table_data(plan: Plan, changed: Changes) -> TableData:
    """The results of a plan's finished runs, by cell.

    Args:
        changed: the options that make the table differ from its default, for its title.
    """
    described: Line = {
        "title": changed.title(plan.title),
        "metrics": list(plan.metrics),
        "source": plan.source,
    }
    cells = [_cell(plan, entry) for entry in plan.entries]
    precisions = {run["precision"] for cell in cells for run in cell.runs} - {None}
    remarks = []
    if len(precisions) > 1:
        remarks.append(f"Some runs are in {' and some in '.join(sorted(precisions))}.")
    if _images_changed(plan):
        remarks.append("The images changed between runs, so these cannot be compared.")
    if remarks:
        described["notes"] = remarks
    return TableData(described, cells)


def _images_changed(plan: Plan) -> bool:
    """Whether finished runs on the same data had other images or labels."""
    records: dict[str, Any] = {}
    for task in plan.tasks.values():
        record = task.folder.environment().get("data")
        if not task.folder.finished or record is None:  # older runs have no record
            continue
        key = f"{task.recipe.data} {task.recipe.image_size}"
        if task.recipe.image_size is None:  # the size then depends on the network
            key += f" {task.recipe.model}"
        first = records.setdefault(key, record)
        known = [name for name in first if None not in (first[name], record.get(name))]
        if any(first[name] != record[name] for name in known):
            return True
    return False


def _cell(plan: Plan, entry: Entry) -> Cell:
    folders = {folder.path: folder for folder in entry.folders}
    if entry.setting == TEACHER:
        # If the teacher is another row's student alone, all its seeds are used.
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
    """`WRN-16-2 → WRN-16-1`, after the row's name if it has one."""
    title = model_name(row.student)
    if row.teacher is not None:
        title = f"{model_name(row.teacher)} → {title}"
    return f"{row.name}: {title}" if row.name else title
