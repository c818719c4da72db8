"""The plots of the studies, drawn by matplotlib in the style of the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..report.charts import chart_style
from ..run_folder import replacing
from ..stats import bootstrap_interval
from .summaries import Cell, TableData

# The colours of lines, distinguishable for the colour-blind (Okabe and Ito, 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
LEVELS = {"student alone": "--", "teacher": ":", "auto": "-"}


@contextmanager
def figure(file: Path, columns: int = 1, width: float = 5.5, height: float = 3.8) -> Iterator[Any]:
    """Yields a row of axes; the figure is written to `file` (.png) at the end."""
    from matplotlib.figure import Figure

    with chart_style():
        drawing = Figure(figsize=(width * columns, height), facecolor="white")
        yield drawing.subplots(1, columns, squeeze=False, sharey=columns > 1)[0]
        with replacing(file) as partial:
            drawing.savefig(partial, format="png", dpi=150, transparent=False)


def scale_by_logarithm(axes: Any) -> None:
    """A logarithmic axis with plain numbers: the style does not parse formulas such as 10^2."""
    from matplotlib.ticker import NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def points(axes: Any, x: Sequence[float], cells: Sequence[Cell], label: str, colour: str) -> None:
    """A line through the means of cells, with their bootstrap intervals."""
    means, low, high, known = [], [], [], []
    for position, cell in zip(x, cells, strict=True):
        values = list(cell.values("error").values())
        if not values:
            continue
        estimate = bootstrap_interval(values)
        known.append(position)
        means.append(estimate.value)
        low.append(estimate.value if estimate.low is None else estimate.low)
        high.append(estimate.value if estimate.high is None else estimate.high)
    axes.plot(known, means, marker="o", color=colour, label=label)
    axes.fill_between(known, low, high, color=colour, alpha=0.16, lw=0)


def save_beta_figure(
    table: TableData, curves: Mapping[str, Mapping[str, Mapping[float, Cell]]], file: Path
) -> None:
    """Error by β: a panel for each convention, a line for each decay; alone and `auto` as levels.

    Args:
        curves: cells by convention, decay and β.
    """
    levels = {name: cell for cell in table.cells if (name := cell.setting) in LEVELS and cell.runs}
    with figure(file, len(curves), width=3.6) as panels:
        for axes, (convention, by_decay) in zip(panels, curves.items(), strict=True):
            for colour, (decay, cells) in zip(COLOURS, by_decay.items(), strict=False):
                points(axes, list(cells), list(cells.values()), decay, colour)
            for name, cell in levels.items():
                mean = cell.mean("error")
                axes.axhline(mean, ls=LEVELS[name], lw=1.2, color="#555555", label=name)
            scale_by_logarithm(axes)
            axes.set_title(convention)
            axes.set_xlabel("β")
        panels[0].set_ylabel("error, %")
        panels[-1].legend(frameon=False)


def save_curves_figure(curves: Mapping[str, Mapping[float, Cell]], label: str, file: Path) -> None:
    """Error as a function of a number, a line for each name."""
    with figure(file) as (axes,):
        for colour, (name, cells) in zip(COLOURS, curves.items(), strict=False):
            points(axes, list(cells), list(cells.values()), name, colour)
        scale_by_logarithm(axes)
        axes.set_xlabel(label)
        axes.set_ylabel("error, %")
        axes.legend(frameon=False)


def save_bars_figure(table: TableData, file: Path) -> None:
    """Each setting's mean error with its interval and its seeds, from best to worst."""
    cells = [cell for cell in table.cells if cell.runs]
    cells.sort(key=lambda cell: cell.mean("error") or 0.0, reverse=True)
    with figure(file, height=0.9 + 0.3 * len(cells)) as (axes,):
        for position, cell in enumerate(cells):
            values = list(cell.values("error").values())
            estimate = bootstrap_interval(values)
            axes.plot(values, [position] * len(values), "o", color="#999999", alpha=0.6)
            if estimate.low is not None and estimate.high is not None:
                axes.plot([estimate.low, estimate.high], [position] * 2, color=COLOURS[0], lw=2)
            axes.plot([estimate.value], [position], "o", color=COLOURS[0])
        axes.set_yticks(range(len(cells)), [_full_name(table, cell) for cell in cells])
        axes.set_xlabel("error, %")


def _full_name(table: TableData, cell: Cell) -> str:
    several = len({other.row for other in table.cells}) > 1
    return f"{cell.row}, {cell.setting}" if several else cell.setting


def save_scatter_figure(
    groups: Mapping[str, Sequence[Mapping[str, Any]]], keys: Mapping[str, str], file: Path
) -> None:
    """Accuracy as a function of a network's measures, a panel each; a colour for each method."""
    with figure(file, len(keys), width=4.2) as panels:
        for axes, (key, label) in zip(panels, keys.items(), strict=True):
            for colour, (name, runs) in zip(COLOURS, groups.items(), strict=False):
                x = [run[key] for run in runs]
                y = [100 - run["error"] for run in runs]
                axes.plot(x, y, "o", color=colour, label=name, alpha=0.7)
            axes.set_xlabel(label)
        panels[0].set_ylabel("accuracy, %")
        panels[-1].legend(frameon=False)


def save_cost_figure(lines: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Latency and time of an image of every network and form, as bars on a log scale."""
    names = [f"{line['network']} {line['form']}" for line in lines]
    with figure(file, 2, height=0.9 + 0.22 * len(lines)) as panels:
        for position, line in enumerate(lines):
            colour = COLOURS[0] if line["role"] == "teacher" else COLOURS[1]
            latency, rate = line["latency_ms"]["median"], line["images_per_second"]["median"]
            for axes, value in zip(panels, (latency, 1000 / rate), strict=True):
                axes.barh(position, value, color=colour)
        for axes, label in zip(panels, ("ms, batch of 1", "ms an image, batches"), strict=True):
            scale_by_logarithm(axes)
            axes.set_xlabel(label)
        panels[0].invert_yaxis()  # of both panels, which share it
        panels[0].set_yticks(range(len(names)), names)
