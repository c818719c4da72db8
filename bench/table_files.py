"""Reads the files of tables in results/, and adds the columns that only pages show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from attention_transfer.errors import UserError, check_choice
from attention_transfer.report.formats import MISSING
from attention_transfer.studies.render import (
    COLUMNS,
    Context,
    TextTable,
    number_writer,
    text_writer,
)
from attention_transfer.studies.summaries import Cell, TableData


def _each(cell: Cell, context: Context) -> str:
    values = cell.values(context.metric).values()
    return ", ".join(f"{value:.2f}" for value in values) or MISSING


def _in_box(cell: Cell, context: Context) -> str:
    mean = cell.mean("in_box")
    return MISSING if mean is None else f"{mean:.1f} %"


COLUMNS |= {
    "each": ("each seed", _each),
    "rate": ("images/s", number_writer("images_per_second", ",.0f")),
    "in box %": ("in the box", _in_box),
    "beta": ("β", text_writer("beta")),
}


def read_table_data(file: Path) -> TableData:
    """Reads a file of `write_table_data`.

    Raises:
        UserError: for a file that cannot be read or holds something else.
    """
    try:
        lines = [
            json.loads(line)
            for line in file.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    if not lines or "title" not in lines[0] or not all("setting" in line for line in lines[1:]):
        raise UserError(
            f"{file} holds no table: expected a line with a title, then a line for each run"
        )
    cells: dict[tuple[str, str], Cell] = {}
    for line in lines[1:]:
        row, setting = line.pop("row", ""), line.pop("setting")
        cell = cells.setdefault((row, setting), Cell(row, setting))
        if "published" in line:
            cell.published, cell.confirmed = line["published"], bool(line.get("confirmed"))
        elif "means" in line:
            cell.means = line["means"]
        else:
            cell.runs.append(line)
    return TableData(lines[0], list(cells.values()))


def joined_table(parts: Sequence[tuple[TableData, Sequence[tuple[str, str | None]]]]) -> TextTable:
    """Joins tables side by side: a row for each setting, and the columns of each table.

    Raises:
        UserError: if a table has several rows in the sense of the paper.
    """
    settings: dict[tuple[str, str], None] = {}
    for table, _ in parts:
        settings |= dict.fromkeys((cell.row, cell.setting) for cell in table.cells)
    if len({row for row, _ in settings}) > 1:
        raise UserError("tables with several rows cannot be joined: expected one row each")
    headers, rows = [""], [[setting] for _, setting in settings]
    for table, columns in parts:
        for name, header in columns:
            check_choice("column", name, COLUMNS)
            standard, writer = COLUMNS[name]
            headers.append(header or standard)
            for line, place in zip(rows, settings, strict=True):
                cell = table.cell(*place)
                line.append(MISSING if cell is None else writer(cell, Context(table)))
    return TextTable(headers, rows)
