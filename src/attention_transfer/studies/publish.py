"""Publishes a finished table: prints it, and writes it as Markdown, JSON lines and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ..console import make_console
from ..outputs import write_numbers
from ..run_folder import replacing
from ..stats import bootstrap_interval
from .render import Context, against_alone, markdown_page, notes, text_table
from .summaries import Cell, TableData, write_table_data


def publish(
    data: TableData, columns: Sequence[str], stem: Path, console: Console, json_file: Path | None
) -> None:
    """Prints a table, and writes it as text, as Markdown and as JSON lines next to its runs.

    Args:
        stem: the path of the files without suffix.
        json_file: the file of --json.
    """
    text = text_table(data, columns).for_terminal(data.title)
    console.print(text)
    for note in notes(data):
        console.out(note)
    files = [stem.with_name(stem.name + suffix) for suffix in (".txt", ".md", ".jsonl")]
    with replacing(files[0]) as partial, open(partial, "w") as stream:
        page = make_console(stream, width=160)
        page.print(text)
        for note in notes(data):
            page.out(note)
    with replacing(files[1]) as partial:
        partial.write_text(markdown_page(data, columns))
    write_table_data(files[2], data)
    names = ", ".join(str(file) for file in files)
    console.out(f"written: {names}")
    # Its bootstrap intervals take time, so they are computed only on request.
    if json_file is not None:
        write_numbers(json_file, table_numbers(data))


def table_numbers(table: TableData) -> dict[str, Any]:
    """The rows of a table, unrounded; errors in percent, None if unknown."""
    rows = [_cell_numbers(cell, table) for cell in table.cells]
    return {"title": table.title, "rows": rows, "notes": notes(table)}


def _cell_numbers(cell: Cell, table: TableData) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "row": cell.row,
        "setting": cell.setting,
        "seeds": [run["seed"] for run in cell.runs],
        "planned": cell.planned,
    }
    for metric in table.metrics:
        numbers[metric] = _metric_numbers(cell, Context(table, metric))
    for key in ("teacher_error", "in_box", "pointing", "minutes", "images_per_second"):
        numbers[key] = cell.mean(key)
    return numbers


def _metric_numbers(cell: Cell, context: Context) -> dict[str, Any] | None:
    spread, published = cell.spread(context.metric), cell.published.get(context.metric)
    if spread is None and published is None:
        return None
    numbers: dict[str, Any] = {"published": published, "published_is_confirmed": cell.confirmed}
    if spread is None:
        return numbers
    interval = bootstrap_interval(spread.values)
    difference = against_alone(cell, context)
    return numbers | {
        **asdict(spread),
        "interval": [interval.low, interval.high],
        "minus_alone": None if difference is None else asdict(difference),
    }
