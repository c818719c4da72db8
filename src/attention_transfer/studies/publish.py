"""Publishes a finished table: prints it, and writes it as Markdown, JSON lines and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ..console import make_console
from ..errors import UserError
from ..outputs import write_numbers
from ..run_folder import replacing
from ..stats import bootstrap_interval
from .render import Context, against_alone, markdown_page, notes, text_table
from .summaries import Cell, TableData, is_table_data, write_table_data


def table_files(stem: Path) -> list[Path]:
    """The files of a table: JSON lines, text, Markdown, and a study's plot."""
    return [stem.with_name(stem.name + suffix) for suffix in (".jsonl", ".txt", ".md", ".png")]


def check_table_files(files: list[Path], force: bool) -> None:
    """Raises `UserError` if a table would replace files that no table wrote.

    Args:
        files: the files to write, the JSON lines first: they show whether existing files are a
            table's.
    """
    existing = [file for file in files if file.exists()]
    for file in existing:
        if not file.is_file():
            raise UserError(f"{file} is no file: choose another --out")
    if existing and not force and not is_table_data(files[0]):
        raise UserError(
            f"{existing[0]} exists, and is no table of this tool: choose another --out, or add "
            "--force to replace it"
        )


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
    lines_file, text_file, page_file, _ = table_files(stem)
    write_table_data(lines_file, data)
    with replacing(text_file) as partial, open(partial, "w", encoding="utf-8") as stream:
        page = make_console(stream, width=160)
        page.print(text)
        for note in notes(data):
            page.out(note)
    with replacing(page_file) as partial:
        partial.write_text(markdown_page(data, columns), encoding="utf-8")
    console.out(f"written: {text_file}, {page_file}, {lines_file}")
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
