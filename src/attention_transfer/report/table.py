"""The table of results: one list of columns, printed in a terminal or set in the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .formats import NONE, count, minutes, percent, plain, rate, signed, times
from .load_run import dig, number
from .rows import Row, Spread
from .summary_text import caveats, decimals, sentences

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class Cell:
    """`text`, a smaller second line, a tooltip, and a tone that only repeats what the text says."""

    text: str = NONE
    sub: str = ""
    hint: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Column:
    """A column; `about` says what it holds; `cost` columns make a second table where the terminal is narrow."""

    head: str
    about: str
    cells: list[Cell]
    cost: bool = False

    @property
    def known(self) -> bool:
        return any(cell.text != NONE for cell in self.cells)


def columns(rows: list[Row]) -> list[Column]:
    """The columns that have something to say about `rows`, the setting itself left out."""
    digits = decimals(rows)

    def column(head: str, about: str, cell: Callable[[Row], Cell], cost: bool = False) -> Column:
        return Column(head, about, [cell(row) for row in rows], cost)

    def measured(
        *keys: str, write: Callable[[float | None], str] = count, compare: bool = True
    ) -> Callable[[Row], Cell]:
        def cell(row: Row) -> Cell:
            ratio = times(row.versus_teacher(*keys)) if compare and row.role != "teacher" else ""
            return Cell(write(row.value(*keys)), sub=f"{ratio} teacher" if ratio else "")

        return cell

    found = [
        column("seeds", "finished runs", _seeds),
        column(
            "error %",
            "validation error, mean ± sample standard deviation",
            lambda r: _error(r, digits),
        ),
        column(
            "median",
            "median error over the seeds, %",
            lambda r: _several(r, lambda s: f"{s.median:.{digits}f}"),
        ),
        column(
            "min–max",
            "lowest and highest error, %",
            lambda r: _several(r, lambda s: _range(s, digits)),
        ),
        column(
            "Δ alone",
            "points of error against the student alone; below zero is better",
            lambda r: _delta(r, digits),
        ),
        column("top-5 error %", "validation top-5 error", lambda r: _top5(r, digits)),
        column("in box %", "share of the last stage's attention inside the object's box", _in_box),
        column("parameters", "of the network", measured("parameters"), cost=True),
        column(
            "FLOPs",
            "forward, one image, a multiply-add counted as two",
            measured("flops"),
            cost=True,
        ),
        column(
            "inference images/s",
            "forward only, in batches",
            measured("inference", "images_per_second", write=rate),
            cost=True,
        ),
        column(
            "latency ms",
            "forward of one image",
            measured("inference", "latency_ms", write=plain, compare=False),
            cost=True,
        ),
        column(
            "training images/s",
            "median over the epochs",
            measured("images_per_second", write=rate, compare=False),
            cost=True,
        ),
        column(
            "minutes",
            "to train one seed",
            measured("seconds", write=minutes, compare=False),
            cost=True,
        ),
    ]
    return [c for c in found if c.known]


def _seeds(row: Row) -> Cell:
    missing = len(row.runs) - len(row.finished)
    return Cell(
        str(len(row.finished)), sub=f"+{missing} unfinished" if missing and row.finished else ""
    )


def _range(spread: Spread, digits: int) -> str:
    return f"{spread.low:.{digits}f}–{spread.high:.{digits}f}"


def _error(row: Row, digits: int) -> Cell:
    error = row.error
    if error is None:
        if row.finished:
            return Cell()
        return Cell("unfinished", sub=_progress(row), tone="warn")
    spread = "" if error.sd is None else f" ± {error.sd:.{digits}f}"
    each = ", ".join(f"{v:.{digits}f}" for v in error.values)
    return Cell(f"{error.mean:.{digits}f}{spread}", hint=f"each seed: {each}")


def _progress(row: Row) -> str:
    last = max(
        (run.metrics[-1] for run in row.runs if run.metrics),
        key=lambda m: number(m.get("epoch")) or 0,
        default=None,
    )
    epoch, planned = number(dig(last, "epoch")), number(row.first.config.get("epochs"))
    if epoch is None:
        return ""
    return f"epoch {epoch:.0f}" + (f" of {planned:.0f}" if planned else "")


def _several(row: Row, write: Callable[[Spread], str]) -> Cell:
    return Cell(write(row.error)) if row.error and row.error.n > 1 else Cell()


def _delta(row: Row, digits: int) -> Cell:
    own, base, delta = row.error, row.baseline.error if row.baseline else None, row.delta
    if own is None or base is None or delta is None:
        return Cell()
    text = signed(delta, digits)
    tone = {"+": "worse", "0": ""}.get(text[0], "better")
    return Cell(
        text, hint=f"{percent(own.mean, digits)} against {percent(base.mean, digits)}", tone=tone
    )


def _top5(row: Row, digits: int) -> Cell:
    error = row.top5_error
    if error is None:
        return Cell()
    return Cell(
        f"{error.mean:.{digits}f}" + ("" if error.sd is None else f" ± {error.sd:.{digits}f}")
    )


def _in_box(row: Row) -> Cell:
    shares, chance = row.in_box(), row.value("attention", "box_area")
    if not shares:
        return Cell()
    stage, share = shares[-1]
    known = "" if chance is None else f"chance {100 * chance:.0f}"
    return Cell(
        f"{100 * share:.1f}",
        sub=known,
        hint=f"{stage}; a uniform map would have the share of the box's area",
    )


def print_table(rows: list[Row], console: Console) -> None:
    """Prints the rows, then the same results in plain words; two tables where one would not fit."""
    from rich.measure import Measurement
    from rich.text import Text

    found = columns(rows)
    whole = _table(rows, found, named=True)
    if (
        Measurement.get(console, console.options.update(max_width=10_000), whole).maximum
        <= console.width
    ):
        console.print(whole)
    else:
        for cost in (False, True):
            if chosen := [c for c in found if c.cost == cost]:
                console.print(_table(rows, chosen, named=cost))
    for line in sentences(rows) + caveats(rows):
        console.print(Text(line), soft_wrap=True)


def _table(rows: list[Row], found: list[Column], named: bool) -> Table:
    """The rows with these columns; `named` adds the network's name."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("setting")
    if named:
        table.add_column("network", no_wrap=True)
    for column in found:
        table.add_column(_stacked(column.head), justify="right", no_wrap=True, vertical="top")
    colour = {"better": "green", "worse": "red", "warn": "yellow"}
    for i, row in enumerate(rows):
        texts = [Text(row.label, style="bold")] + ([Text(row.model)] if named else [])
        for column in found:
            cell = column.cells[i]
            text = Text(cell.text, style=colour.get(cell.tone, ""))
            texts.append(
                text + Text("\n" + cell.sub.removesuffix(" teacher"), style="dim")
                if cell.sub
                else text
            )
        table.add_row(*texts)
    if any(cell.sub.endswith(" teacher") for column in found for cell in column.cells):
        table.caption, table.caption_justify = "×: times the teacher's", "left"
    return table


def _stacked(head: str) -> str:
    """The head of a column on two lines where it is long."""
    return head.replace(" ", "\n", 1) if len(head) > 9 else head


def subtitle(row: Row) -> str:
    """The network of a row whose label does not name it."""
    return "" if row.model in row.label else row.model
