"""Renders a table of runs as text, as Markdown, and as cells of other tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import check_choice
from ..report.formats import MISSING, signed
from ..stats import Estimate, bootstrap_interval, paired_difference
from .summaries import Cell, TableData

ALONE = ("student alone", "alone")
METRIC_NAMES = {"error": "error", "top5_error": "top-5 error"}
UNCONFIRMED = "†"
UNCONFIRMED_NOTE = f"{UNCONFIRMED} as we read the paper, not checked against a second public text."


@dataclass(frozen=True)
class Context:
    """The table and settings that a column needs besides its cell."""

    table: TableData
    metric: str = "error"


Writer = Callable[[Cell, Context], str]


def _seeds(cell: Cell, context: Context) -> str:
    if cell.planned > len(cell.runs):
        return f"{len(cell.runs)} of {cell.planned}"
    return str(len(cell.runs))


def _mean(cell: Cell, context: Context) -> str:
    spread = cell.spread(context.metric)
    if spread is None:
        return MISSING
    if spread.sd is None:
        return f"{spread.mean:.2f}"
    return f"{spread.mean:.2f} ± {spread.sd:.2f}"


def _median(cell: Cell, context: Context) -> str:
    spread = cell.spread(context.metric)
    return MISSING if spread is None else f"{spread.median:.2f}"


def _range(cell: Cell, context: Context) -> str:
    spread = cell.spread(context.metric)
    if spread is None or spread.n < 2:
        return MISSING
    return f"{spread.low:.2f}–{spread.high:.2f}"


def _interval(cell: Cell, context: Context) -> str:
    values = list(cell.values(context.metric).values())
    if len(values) < 2:
        return MISSING
    return _bounds(bootstrap_interval(values))


def _bounds(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return MISSING
    return f"{estimate.low:.2f}–{estimate.high:.2f}"


def _paper(cell: Cell, context: Context) -> str:
    figure = cell.published.get(context.metric)
    if figure is None:
        return MISSING
    mark = "" if cell.confirmed else UNCONFIRMED
    return f"{figure:g}{mark}"


def _difference(cell: Cell, context: Context) -> str:
    spread, figure = cell.spread(context.metric), cell.published.get(context.metric)
    if spread is None or figure is None:
        return MISSING
    return signed(spread.median - figure, 2)


def against_alone(cell: Cell, context: Context) -> Estimate | None:
    """Mean difference to the student alone of the same row, over their common seeds."""
    for name in ALONE:
        alone = context.table.cell(cell.row, name)
        if alone is not None and alone is not cell and cell.setting != "teacher":
            return paired_difference(cell.values(context.metric), alone.values(context.metric))
    return None


def _against_alone(cell: Cell, context: Context) -> str:
    estimate = against_alone(cell, context)
    if estimate is None:
        return MISSING
    text = signed(estimate.value, 2)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ({signed(estimate.low, 2)} to {signed(estimate.high, 2)})"


def _p_value(cell: Cell, context: Context) -> str:
    estimate = against_alone(cell, context)
    if estimate is None or estimate.p is None:
        return MISSING
    return f"{estimate.p:.2g}"


def number_writer(key: str, form: str) -> Writer:
    """The mean over the seeds of a number that the runs measured."""

    def write(cell: Cell, context: Context) -> str:
        mean = cell.mean(key)
        return MISSING if mean is None else format(mean, form)

    return write


def text_writer(key: str) -> Writer:
    def write(cell: Cell, context: Context) -> str:
        values = dict.fromkeys(str(run[key]) for run in cell.runs if run.get(key) is not None)
        return ", ".join(values) or MISSING

    return write


# By name: the header, and the function that writes a cell.
COLUMNS: dict[str, tuple[str, Writer]] = {
    "seeds": ("seeds", _seeds),
    "median": ("median", _median),
    "range": ("min–max", _range),
    "mean": ("error %", _mean),
    "interval": ("95 % interval of the mean", _interval),
    "paper": ("paper", _paper),
    "difference": ("difference", _difference),
    "against alone": ("against alone (95 %)", _against_alone),
    "p": ("p", _p_value),
    "minutes": ("minutes per run", number_writer("minutes", ".1f")),
    "in box": ("in the box, %", number_writer("in_box", ".1f")),
    "pointing": ("pointing game, %", number_writer("pointing", ".1f")),
    "teacher error": ("teacher's error %", number_writer("teacher_error", ".2f")),
    "images": ("training images", text_writer("limit_train")),
    "epochs": ("epochs", text_writer("epochs")),
}
REPRODUCTION = ("seeds", "median", "range", "paper", "difference", "against alone")
STUDY = ("seeds", "mean", "interval", "against alone", "p")


@dataclass(frozen=True)
class TextTable:
    """Headers and rows of text; the first `labels` columns are names."""

    headers: list[str]
    rows: list[list[str]]
    labels: int = 1

    def markdown(self) -> str:
        texts = []
        for line in (self.headers, *self.rows):
            cells = " | ".join(cell.replace("|", "\\|") for cell in line)
            texts.append(f"| {cells} |".replace("|  |", "| |"))
        texts.insert(1, "|" + "---|" * len(self.headers))
        return "\n".join(texts)

    def for_terminal(self, title: str) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for index, header in enumerate(self.headers):
            justify: Any = "left" if index < self.labels else "right"
            table.add_column(header, justify=justify, overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table


def text_table(table: TableData, columns: Sequence[str]) -> TextTable:
    """A row for each cell of the table: its row and setting, and the columns for each metric."""
    several = len({cell.row for cell in table.cells}) > 1
    headers = ["", ""] if several else [""]
    labels = len(headers)
    writers: list[tuple[Writer, Context]] = []
    for position, metric in enumerate(table.metrics):
        for name in columns:
            check_choice("column", name, COLUMNS)
            if position and name == "seeds":
                continue
            header, writer = COLUMNS[name]
            if len(table.metrics) > 1 and name != "seeds":
                header = f"{METRIC_NAMES[metric]} {header}"
            headers.append(header)
            writers.append((writer, Context(table, metric)))
    rows = []
    for cell in table.cells:
        names = [cell.row, cell.setting] if several else [cell.setting]
        rows.append(names + [writer(cell, context) for writer, context in writers])
    return _without_empty(TextTable(headers, rows, labels))


def _without_empty(table: TextTable) -> TextTable:
    """The table without empty columns."""
    kept = list(range(table.labels))
    for index in range(table.labels, len(table.headers)):
        if any(row[index] != MISSING for row in table.rows):
            kept.append(index)
    rows = [[row[index] for index in kept] for row in table.rows]
    return TextTable([table.headers[index] for index in kept], rows, table.labels)


def notes(table: TableData) -> list[str]:
    """Notes that a reader of the table needs."""
    lines = [str(note) for note in table.head.get("notes", [])]
    published = [cell for cell in table.cells if cell.published]
    if any(not cell.confirmed for cell in published):
        lines.append(UNCONFIRMED_NOTE)
    return lines


def markdown_page(table: TableData, columns: Sequence[str]) -> str:
    """The table as a page: title, table, notes."""
    remarks = "\n".join(f"- {note}" for note in notes(table))
    return f"# {table.title}\n\n{text_table(table, columns).markdown()}\n\n{remarks}\n"
