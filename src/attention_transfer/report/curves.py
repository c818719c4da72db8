"""Charts of runs as matplotlib figures: errors of the seeds, and curves by epoch."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

from .formats import option_value, short_label
from .load_run import LoadedRun, finite_number, get_nested
from .rows import SettingRow
from .summary_text import error_digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9.4  # inches, of every chart
SPIKE = 4  # losses above this multiple of the chart's median are cut off

# The page's colours in light mode; `svg.py` lets the page replace them in dark mode.
INK, SOFT, GRID, PAPER = "#16202e", "#5b6676", "#dfe4ea", "#ffffff"
SETTING_COLOURS = [
    "#334155", "#d97706", "#2563eb", "#0d9488", "#c026d3", "#65a30d", "#dc2626", "#7c3aed",
]  # fmt: skip

# Lengths of dashes and gaps in points; an empty pattern is a solid line.
TEACHER_DASH = (10, 4)
DASHES = ((), (2.4, 2.8), (14, 3.2, 2.4, 3.2))


@dataclass(frozen=True)
class Style:
    """How charts and legends draw a setting: the index of its colour, and its dash pattern."""

    index: int
    dash: tuple[float, ...] = ()

    @property
    def colour(self) -> str:
        return SETTING_COLOURS[self.index]


@dataclass(frozen=True)
class Panel:
    """A line for each row in one of a chart's axes."""

    title: str
    lines: dict[SettingRow, Series]
    is_weight: bool = False  # a weight of the loss, not a part of it


@dataclass(frozen=True)
class Chart:
    """A chart: `alt` describes what it shows; `panels` are its curves, each in its axes."""

    name: str
    title: str
    figure: Figure
    alt: str
    caption: str = ""
    panels: list[tuple[Axes, Panel]] = field(default_factory=list)


@dataclass(frozen=True)
class Series:
    """Values by epoch over the seeds: mean, lowest and highest, each as long as `epochs`."""

    epochs: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]

    def as_error(self) -> Series:
        """Accuracies in [0, 1] as errors in percent."""
        mean = [100 * (1 - accuracy) for accuracy in self.mean]
        low = [100 * (1 - accuracy) for accuracy in self.high]
        high = [100 * (1 - accuracy) for accuracy in self.low]
        return Series(self.epochs, mean, low, high)

    @property
    def varies(self) -> bool:
        low, high = min(self.low), max(self.high)
        return high - low > 1e-6 * max(abs(low), abs(high))  # more than rounding


@dataclass(frozen=True)
class EndLabel:
    """A label at the end of a row's line, at the height `y`."""

    y: float
    label: str
    colour: str
    id: str


def row_id(row: SettingRow, styles: dict[SettingRow, Style]) -> str:
    """The id of a row's marks in an SVG."""
    return f"row-{[*styles].index(row)}"


def make_styles(rows: list[SettingRow]) -> dict[SettingRow, Style]:
    """Teachers get dashed black lines, the student alone the first colour, methods the others."""
    styles: dict[SettingRow, Style] = {}
    others = 0
    for row in rows:
        if row.role == "teacher":
            styles[row] = Style(0, TEACHER_DASH)
        elif row.role == "alone" and Style(1) not in styles.values():
            styles[row] = Style(1)
        else:
            # After the last colour, the colours start again with another dash pattern.
            dash, colour = divmod(others, len(SETTING_COLOURS) - 2)
            styles[row] = Style(2 + colour, DASHES[dash % len(DASHES)])
            others += 1
    return styles


def series(runs: list[LoadedRun], *keys: str) -> Series | None:
    """The metric at `keys` of metrics.jsonl by epoch; None if no run has it.

    Unfinished runs are used only if no run is finished.
    """
    values: dict[float, list[float]] = {}
    for run in [run for run in runs if run.finished] or runs:
        for metrics in run.metrics:
            epoch = finite_number(metrics.get("epoch"))
            value = finite_number(get_nested(metrics, *keys))
            if epoch is not None and value is not None:
                values.setdefault(epoch, []).append(value)
    if not values:
        return None
    epochs = sorted(values)
    means = [statistics.fmean(values[epoch]) for epoch in epochs]
    lows = [min(values[epoch]) for epoch in epochs]
    highs = [max(values[epoch]) for epoch in epochs]
    return Series(epochs, means, lows, highs)


def series_by_row(rows: list[SettingRow], *keys: str) -> dict[SettingRow, Series]:
    """The metric at `keys` of each row that has it."""
    all_series = {row: series(row.runs, *keys) for row in rows}
    return {row: line for row, line in all_series.items() if line is not None}


def spread_chart(rows: list[SettingRow], styles: dict[SettingRow, Style]) -> Chart | None:
    """A dot for each seed's error and a bar at the mean; None for fewer than two rows."""
    from matplotlib.figure import Figure

    errors = {row: row.error for row in rows if row.error is not None}
    if len(errors) < 2:
        return None
    digits = error_digits(rows)
    figure = Figure(figsize=(WIDTH, 0.62 + 0.36 * len(errors)))
    axes = figure.subplots()
    descriptions = []
    for y, (row, error) in enumerate(errors.items()):
        colour = styles[row].colour
        axes.plot([error.low, error.high], [y, y], color=colour, lw=5, alpha=0.25)
        axes.plot(error.values, [y] * error.n, "o", ms=6, color=colour, mec=PAPER, mew=1)
        axes.plot([error.mean] * 2, [y - 0.3, y + 0.3], color=colour, lw=2.2)
        mean, low, high = (f"{v:.{digits}f} %" for v in (error.mean, error.low, error.high))
        _write_beside(axes, y, mean, INK)
        descriptions.append(f"{row.label} mean {mean}, from {low} to {high}")
    labels = [short_label(row.label) for row in errors]
    axes.set_yticks(range(len(errors)), labels, fontsize=10.5, color=INK)
    axes.set_ylim(len(errors) - 0.45, -0.55)  # the first row is on top
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("validation error, %")
    return Chart(
        name="spread",
        title="Error of every seed",
        figure=figure,
        alt="Validation error of each seed: " + "; ".join(descriptions),
        caption="Each dot is a seed; the vertical bar is their mean.",
    )


def error_chart(rows: list[SettingRow], styles: dict[SettingRow, Style]) -> Chart | None:
    """Validation error by epoch, and the level of a teacher that is not among the runs."""
    accuracies = series_by_row(rows, "val_accuracy")
    lines = {row: accuracy.as_error() for row, accuracy in accuracies.items()}
    if not lines:
        return None
    panel = Panel("", lines)
    figure, (axes,) = _draw_panels([panel], styles, 4.0)
    axes.set_ylabel("validation error, %")
    ends, descriptions = [], []
    for row, line in lines.items():
        label, colour = short_label(row.label), styles[row].colour
        ends.append(EndLabel(line.mean[-1], label, colour, row_id(row, styles)))
        descriptions.append(f"{row.label} ends at {line.mean[-1]:.1f} %")
    levels = []
    # A teacher that is not among the runs has an error but no curve.
    for row in rows:
        if row.is_implied and row not in lines and row.error is not None:
            level = row.error.mean
            axes.axhline(level, color=SOFT, ls=(0, TEACHER_DASH), lw=1.3, gid=row_id(row, styles))
            ends.append(EndLabel(level, short_label(row.label), SOFT, row_id(row, styles)))
            levels.append(Series([0], [level], [level], [level]))
            descriptions.append(f"{row.label} is at {level:.1f} %")
    _set_limits(axes, [*lines.values(), *levels])
    _label_ends(axes, ends)
    alt = "Validation error by epoch: " + "; ".join(descriptions)
    caption = _band_caption(rows)
    return Chart("error", "Validation error", figure, alt, caption, [(axes, panel)])


def loss_chart(rows: list[SettingRow], styles: dict[SettingRow, Style]) -> Chart | None:
    """Cross-entropy by epoch, of training and validation."""
    training = Panel("training", series_by_row(rows, "train_loss"))
    validation = Panel("validation", series_by_row(rows, "val_loss"))
    lines = [*training.lines.values(), *validation.lines.values()]
    if not lines:
        return None
    figure, (left, right) = _draw_panels([training, validation], styles, 3.3)
    left.set_ylabel("cross-entropy")
    right.sharey(left)
    right.tick_params(labelleft=False)
    _set_limits(left, lines)
    labels = ", ".join(row.label for row in rows)
    alt = f"Cross-entropy by epoch, training on the left and validation on the right, for {labels}"
    caption = f"{_band_caption(rows)} A spike above {SPIKE}× the median is cut off."
    panels = [(left, training), (right, validation)]
    return Chart("loss", "Cross-entropy", figure, alt, caption.strip(), panels)


def parts_chart(rows: list[SettingRow], styles: dict[SettingRow, Style]) -> Chart | None:
    """A panel for each part of the loss and for each weight that a schedule changes."""
    students = [row for row in rows if row.role != "teacher"]
    panels, constant = [], []
    for name in _names(students, "parts"):
        lines = series_by_row(students, "parts", name)
        panels.append(Panel(_symbol(name), lines))
    for name in _names(students, "weights"):
        lines = series_by_row(students, "weights", name)
        varying = {row: line for row, line in lines.items() if line.varies}
        panels.append(Panel(f"weight {_symbol(name)}", varying, is_weight=True))
        for row, line in lines.items():
            if row not in varying:
                weight = option_value(round(line.mean[0], 6))
                constant.append(f"{row.label}: {_symbol(name)} = {weight}")
    panels = [panel for panel in panels if panel.lines]
    # If cross-entropy is the only part, the loss chart shows it.
    if not panels or [panel.title for panel in panels] == [_symbol("ce")]:
        return None
    figure, grid = _draw_panels(panels, styles, 2.6)
    title, caption = "Parts of the training loss", "Each panel has its own scale."
    if any(panel.is_weight for panel in panels):
        title += ", and the weights in effect"
    if constant:
        caption += f" Constant weights: {'; '.join(constant)}."
    names = ", ".join(panel.title for panel in panels)
    alt = f"Parts of the loss and weights by epoch: {names}"
    return Chart("parts", title, figure, alt, caption, [*zip(grid, panels, strict=False)])


def _names(rows: list[SettingRow], key: str) -> list[str]:
    """The names of the parts or weights in the rows' metrics, each once."""
    names: dict[str, None] = {}
    for run in chain.from_iterable(row.runs for row in rows):
        for metrics in run.metrics:
            names |= dict.fromkeys(metrics.get(key) or {})
    return list(names)


def _symbol(name: str) -> str:
    """`beta` -> `β`, `at.beta` -> `β of at` (with several methods), `beta[a=b]` -> `β[a=b]`."""
    whole, bracket, layer = name.partition("[")
    method, _, option = whole.rpartition(".")
    symbol = {"beta": "β", "alpha": "α", "ce": "cross-entropy"}.get(option, option)
    symbol += bracket + layer
    if method:
        return f"{symbol} of {method}"
    return symbol


def _band_caption(rows: list[SettingRow]) -> str:
    if any(len(row.runs) > 1 for row in rows):
        return "Line: mean over the seeds; band: lowest to highest."
    return ""


def _draw_panels(
    panels: list[Panel], styles: dict[SettingRow, Style], height: float
) -> tuple[Figure, list[Axes]]:
    """A figure with axes for each panel, in rows of `height` inches, and these axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    across = len(panels)
    if across > 4:
        across = 3
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(WIDTH, height * down))
    grid = figure.subplots(down, across, squeeze=False).flatten()
    for axes, panel in zip_longest(grid, panels):
        if panel is None:
            axes.remove()
            continue
        _draw_lines(axes, panel, styles)
        _set_limits(axes, list(panel.lines.values()), cut_spikes=not panel.is_weight)
        axes.set_title(panel.title)
        axes.set_xlabel("epoch")
        axes.grid(axis="y")
        axes.margins(x=0.015)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    return figure, list(grid)


def _draw_lines(axes: Axes, panel: Panel, styles: dict[SettingRow, Style]) -> None:
    count = len(panel.lines)
    for i, (row, line) in enumerate(panel.lines.items()):
        style, id = styles[row], row_id(row, styles)
        if line.low != line.high:
            axes.fill_between(
                line.epochs, line.low, line.high, color=style.colour, alpha=0.16, lw=0,
                gid=id,
            )  # fmt: skip
        width = 1.9
        if panel.is_weight:
            # Equal values are common: each line is narrower than the one below it, so that all
            # lines are visible.
            width += min(2.4, 5 / count) * (count - 1 - i)
        elif row.role == "teacher":
            width = 1.6
        # A line of one or two points is hard to see without markers.
        marker = "o" if len(line.epochs) < 3 else ""
        stroke: dict[str, Any] = {"color": style.colour, "ls": (0, style.dash or None), "lw": width}
        axes.plot(line.epochs, line.mean, marker=marker, gid=id, **stroke)


def _set_limits(axes: Axes, lines: list[Series], cut_spikes: bool = True) -> None:
    """Sets the limits of y; `cut_spikes` leaves out early epochs and spikes far above the rest."""
    if not lines:
        return
    last = max(line.epochs[-1] for line in lines)
    # In a long run the first epochs are so high that the later ones would look equal.
    first_shown = 0.0
    if cut_spikes and last >= 20:
        first_shown = last / 6
    highs, lows = [], []
    for line in lines:
        lows += line.low
        for epoch, high in zip(line.epochs, line.high, strict=True):
            if epoch >= first_shown or epoch == line.epochs[-1]:
                highs.append(high)
    top, low = max(highs), min(lows)
    if cut_spikes:
        top = min(top, SPIKE * statistics.median(highs))
    margin = 0.06 * (top - low) or 0.06 * abs(top) or 1.0  # not 0 for a constant line
    bottom = low - margin
    if low >= 0:
        bottom = max(0.0, bottom)
    axes.set_ylim(bottom, top + margin)


def _label_ends(axes: Axes, ends: list[EndLabel]) -> None:
    """Writes each label beside the axes; labels too close together move apart."""
    low, high = axes.get_ylim()
    gap = 0.062 * (high - low)  # the height of a label
    ends = sorted(ends, key=lambda end: (end.y, end.label))
    heights: list[float] = []
    lowest_free = low
    for end in ends:
        heights.append(max(end.y, lowest_free))
        lowest_free = heights[-1] + gap
    # If labels were pushed above the axes, move them and the labels below them down.
    highest_free = high
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], highest_free)
        highest_free = heights[i] - gap
    for end, height in zip(ends, heights, strict=True):
        _write_beside(axes, height, end.label, end.colour, fontweight="bold", gid=end.id)


def _write_beside(axes: Axes, y: float, text: str, colour: str, **style: Any) -> None:
    """Writes text at the right of the axes, at `y` in data units."""
    place = axes.get_yaxis_transform()  # x in widths of the axes, y in data units
    axes.text(1.012, y, text, transform=place, va="center", fontsize=10, color=colour, **style)
