"""The table of results: its columns, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..stats import Spread
from .formats import MINUS, MISSING, count, minutes, percent, rate, signed, significant
from .labels import setting_columns
from .load_run import finite_number
from .rows import SettingRow
from .summary_text import caveats, error_digits, sentences
from .teachers import with_teachers

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Kind = Literal["setting", "result", "cost"]

# Descriptions of the columns, in their order.
DESCRIPTIONS = {
    "seeds": "finished runs",
    "error %": "validation error, mean ± sample standard deviation",
    "fp32 error %": "error of the exported float32 weights, if the run was trained in bfloat16",
    "median": "median error over the seeds, %",
    "min–max": "lowest and highest error, %",
    "Δ alone": "points of error against the student alone; below zero is better",
    "top-5 error %": "validation top-5 error",
    "in box %": "share of the last stage's attention inside the object's box",
    "parameters": "of the network",
    "FLOPs": "forward, one image, a multiply-add counted as two",
    "inference images/s": "forward only, in batches of 128: median, and lowest to highest",
    "latency ms": "forward of one image: median, and lowest to highest",
    "peak MiB": "of a forward pass of 128 images, beyond the weights",
    "precision": "of the training and of the speed measurement",
    "training images/s": "of the run: median over the epochs",
    "minutes": "to train one seed",
}

# Costs by header: the keys in summary.json, the format, and whether to compare with the teacher.
COSTS: dict[str, tuple[tuple[str, ...], Callable[[float], str], bool]] = {
    "parameters": (("parameters",), count, True),
    "FLOPs": (("flops",), count, True),
    "training images/s": (("images_per_second",), rate, False),
    "minutes": (("seconds",), minutes, False),
}


# Measured together for a comparison. The speeds in a run's summary.json are not used, because they
# depend on the load of its machine at that time.
SPEEDS: dict[str, tuple[str, Callable[[float], str]]] = {
    "inference images/s": ("images_per_second", rate),
    "latency ms": ("latency_ms", significant),
}
COST_COLUMNS = {*COSTS, *SPEEDS, "peak MiB", "precision"}


@dataclass(frozen=True)
class Cell:
    """A cell: its text, a smaller second line, a tooltip of the page, and the text's tone.

    The tone is `better`, `worse`, `warn` or empty; it repeats information of the text.
    """

    text: str = MISSING
    subtext: str = ""
    tooltip: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Column:
    """A column with a cell for each row; in a narrow terminal, each kind gets its own table."""

    header: str
    description: str
    cells: list[Cell]
    kind: Kind


def columns(rows: list[SettingRow]) -> list[Column]:
    """The options that differ, and the columns in which at least one row has a value."""
    digits = error_digits(rows)
    cells_by_header = [_result_cells(row, digits) | _cost_cells(row) for row in rows]
    columns = []
    for header, texts in setting_columns(rows).items():
        columns.append(Column(header, "an option that differs", [*map(Cell, texts)], "setting"))
    for header, description in DESCRIPTIONS.items():
        if any(header in cells for cells in cells_by_header):
            column = [cells.get(header, Cell()) for cells in cells_by_header]
            kind: Kind = "cost" if header in COST_COLUMNS else "result"
            columns.append(Column(header, description, column, kind))
    return columns


def _result_cells(row: SettingRow, digits: int) -> dict[str, Cell]:
    """The cells, by header, for which the row has results."""
    if row.is_implied:
        cells = {"seeds": Cell(MISSING, tooltip="measured by its student's run")}
    else:
        cells = {"seeds": Cell(str(len(row.finished)))}
    unfinished = len(row.runs) - len(row.finished)
    if not row.finished:
        cells["error %"] = Cell("unfinished", _epochs_done(row), tone="warn")
    elif unfinished:
        cells["seeds"] = Cell(str(len(row.finished)), f"+{unfinished} unfinished")

    error, baseline_error, delta = row.error, row.baseline_error, row.delta
    if error is not None:
        values = ", ".join(f"{value:.{digits}f}" for value in error.values)
        cells["error %"] = Cell(_mean_and_sd(error, digits), tooltip=f"each seed: {values}")
    if row.fp32_error is not None:
        cells["fp32 error %"] = Cell(_mean_and_sd(row.fp32_error, digits))
    if error is not None and error.n > 1:
        cells["median"] = Cell(f"{error.median:.{digits}f}")
        cells["min–max"] = Cell(f"{error.low:.{digits}f}–{error.high:.{digits}f}")
    if error is not None and baseline_error is not None and delta is not None:
        tooltip = f"{error.mean:.{digits}f} % against {baseline_error.mean:.{digits}f} %"
        # The tone follows the rounded text: 0.0 is neither better nor worse.
        text = signed(delta, digits)
        tone = {"+": "worse", MINUS: "better"}.get(text[0], "")
        cells["Δ alone"] = Cell(text, tooltip=tooltip, tone=tone)
    if row.top5_error is not None:
        cells["top-5 error %"] = Cell(_mean_and_sd(row.top5_error, digits))

    shares, chance = row.in_box(), row.median("attention", "box_area")
    if shares:
        stage = list(shares)[-1]
        tooltip = f"{stage}; a uniform map would have the share of the box's area"
        subtext = "" if chance is None else f"chance {100 * chance:.0f}"
        cells["in box %"] = Cell(percent(shares[stage]), subtext, tooltip)
    return cells


def _epochs_done(row: SettingRow) -> str:
    """`epoch 5 of 12`, of the most advanced run."""
    epochs = [finite_number(run.metrics[-1].get("epoch")) for run in row.runs if run.metrics]
    furthest = max(filter(None, epochs), default=None)
    planned = finite_number(row.first.config.get("epochs"))
    if furthest is None:
        return ""
    if planned is None:
        return f"epoch {furthest:.0f}"
    return f"epoch {furthest:.0f} of {planned:.0f}"


def _mean_and_sd(spread: Spread, digits: int) -> str:
    """`25.7 ± 0.7`, or the mean alone for a single seed."""
    if spread.sd is None:
        return f"{spread.mean:.{digits}f}"
    return f"{spread.mean:.{digits}f} ± {spread.sd:.{digits}f}"


def _cost_cells(row: SettingRow) -> dict[str, Cell]:
    """The costs that the row's runs measured, by header, with their ratios to the teacher's."""
    cells = {}
    for header, (keys, write, compare) in COSTS.items():
        value, ratio = row.median(*keys), row.times_teacher(*keys)
        if value is None:
            continue
        subtext = ""
        if compare and ratio is not None and row.role != "teacher":
            subtext = f"{significant(ratio, 2)}× teacher"
        cells[header] = Cell(write(value), subtext)
    return cells | _speed_cells(row)


def _speed_cells(row: SettingRow) -> dict[str, Cell]:
    """Speeds with their spread, peak memory and precision, by header."""
    cells = {}
    for header, (key, write) in SPEEDS.items():
        middle, low, high = (row.speed(key, name) for name in ("median", "low", "high"))
        if middle is not None and low is not None and high is not None:
            cells[header] = Cell(write(middle), f"{write(low)}–{write(high)}")
    peak = row.speed("peak_mib")
    if peak is not None:
        cells["peak MiB"] = Cell(significant(peak, 2))
    if row.precision:
        cells["precision"] = Cell(row.precision)
    return cells


def print_table(rows: list[SettingRow], console: Console) -> None:
    """Prints the rows as one table, or as several if one is too wide, then the sentences.

    Nothing is truncated: a column that does not fit goes into the next table.
    """
    rows = with_teachers(rows)
    networks = Column("network", "", [Cell(row.model) for row in rows], "setting")
    tables, waiting = [], [networks, *columns(rows)]
    while waiting:
        fitting = 1
        while fitting < len(waiting) and _fits(_table(rows, waiting[: fitting + 1]), console):
            fitting += 1
        if fitting < len(waiting):
            fitting = _whole_kinds(waiting, fitting)
        tables.append(_table(rows, waiting[:fitting]))
        waiting = waiting[fitting:]
    for table in tables:
        console.print(table)
    for line in sentences(rows) + caveats(rows):
        console.out(line)


def _fits(table: Table, console: Console) -> bool:
    # Measured on a very wide console, because the console's width limits the result.
    options = console.options.update(max_width=10_000)
    return console.measure(table, options=options).maximum <= console.width


def _whole_kinds(columns: list[Column], fitting: int) -> int:
    """At most `fitting` columns, so that columns of one kind are not split between tables."""
    start = fitting
    while start and columns[start - 1].kind == columns[fitting].kind:
        start -= 1
    return start or fitting


def _table(rows: list[SettingRow], columns: list[Column]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    # A word that is longer than its column is wrapped.
    table.add_column("setting", overflow="fold")
    for column in columns:
        header = column.header
        if len(header) > 9:
            header = header.replace(" ", "\n", 1)
        left = column.kind == "setting"
        table.add_column(
            header, justify="left" if left else "right", vertical="top", overflow="fold"
        )
    colours = {"better": "green", "worse": "red", "warn": "yellow"}
    for i, row in enumerate(rows):
        texts = [Text(row.label, style="bold")]
        for cell in (column.cells[i] for column in columns):
            text = Text(cell.text, style=colours.get(cell.tone, ""))
            if cell.subtext:
                text += Text("\n" + cell.subtext.removesuffix(" teacher"), style="dim")
            texts.append(text)
            # The caption mentions the teacher once for the whole table.
            if cell.subtext.endswith(" teacher"):
                table.caption, table.caption_justify = "×: times the teacher's", "left"
        table.add_row(*texts)
    return table
