"""Figures as inline SVG that take their colours from the page, so that they are right on a light and a dark one."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .formats import setting, short
from .load_run import Run, dig, number
from .rows import Row
from .summary_text import absent_teachers, decimals

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = 8
INK, SOFT, GRID, PAPER = "#0a0c00", "#0a0c01", "#0a0c02", "#0a0c03"
"""Stand-ins that `_inline` replaces by the page's own colours; `#0a0b??` is the colour of a setting."""
DASHES: tuple[Any, ...] = ("-", (0, (1.2, 1.4)), (0, (7, 1.6, 1.2, 1.6)))


@dataclass(frozen=True)
class Style:
    """How a setting is drawn everywhere: `variable` names its colour in the page, `dash` its line."""

    index: int
    dash: Any

    @property
    def colour(self) -> str:
        return f"#0a0b{self.index:02x}"

    @property
    def variable(self) -> str:
        return f"--c{self.index}"

    @property
    def dash_array(self) -> str:
        """The dash as SVG writes it, for a legend."""
        return "none" if self.dash == "-" else " ".join(str(2 * d) for d in self.dash[1])


@dataclass(frozen=True)
class Plot:
    """One figure of the page: `svg` is markup, `alt` says what it shows."""

    title: str
    svg: str
    alt: str
    caption: str = ""


# A loss this many times the plot's median is a spike, and would flatten everything else.
SPIKE = 4


@dataclass(frozen=True)
class Series:
    """Values over epochs: mean, lowest and highest of the seeds, each a list as long as `epochs`."""

    epochs: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def styles(rows: list[Row]) -> dict[Row, Style]:
    """Teachers in ink with long dashes, the student alone in the first colour, methods in the next ones."""
    found, next_colour = {}, 2
    for row in rows:
        if row.role == "teacher":
            found[row] = Style(0, (0, (5, 2)))
        elif row.role == "alone" and 1 not in {s.index for s in found.values()}:
            found[row] = Style(1, "-")
        else:
            turn = next_colour - 2
            found[row] = Style(
                2 + turn % (COLOURS - 2), DASHES[turn // (COLOURS - 2) % len(DASHES)]
            )
            next_colour += 1
    return found


def series(runs: list[Run], read: Callable[[dict[str, Any]], float | None]) -> Series | None:
    """What `read` finds in the metrics, over the finished runs (or all, where none is finished)."""
    chosen = [run for run in runs if run.finished] or runs
    values: dict[float, list[float]] = {}
    for run in chosen:
        for row in run.metrics:
            epoch, value = number(row.get("epoch")), read(row)
            if epoch is not None and value is not None:
                values.setdefault(epoch, []).append(value)
    if not values:
        return None
    epochs = sorted(values)
    of = [values[e] for e in epochs]
    return Series(epochs, [sum(v) / len(v) for v in of], [min(v) for v in of], [max(v) for v in of])


def _metric(*keys: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda row: number(dig(row, *keys))


def _error(row: dict[str, Any]) -> float | None:
    accuracy = number(row.get("val_accuracy"))
    return None if accuracy is None else 100 * (1 - accuracy)


def spread_figure(rows: list[Row], look: dict[Row, Style]) -> Plot | None:
    """A dot for each seed's error, a bar at the mean; None where fewer than two rows are finished."""
    shown = [(row, error) for row in rows if (error := row.error)]
    if len(shown) < 2:
        return None
    digits = decimals(rows)
    with _drawing(9.4, 0.62 + 0.36 * len(shown)) as (figure, out):
        axes = figure.add_axes(
            (0.19, 0.42 / figure.get_figheight(), 0.71, 1 - 0.5 / figure.get_figheight())
        )
        for y, (row, error) in enumerate(shown):
            colour = look[row].colour
            axes.plot(
                [error.low, error.high],
                [y, y],
                color=colour,
                lw=5,
                alpha=0.25,
                solid_capstyle="round",
            )
            axes.plot(error.values, [y] * error.n, "o", ms=6, color=colour, mec=PAPER, mew=1)
            axes.plot([error.mean] * 2, [y - 0.3, y + 0.3], color=colour, lw=2.2)
            axes.annotate(
                f"{error.mean:.{digits}f} %",
                (1.012, y),
                xycoords=("axes fraction", "data"),
                va="center",
                color=INK,
                fontsize=10,
            )
        axes.set_yticks(
            range(len(shown)), [short(row.label) for row, _ in shown], fontsize=10.5, color=INK
        )
        axes.set_ylim(len(shown) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=GRID, lw=0.8)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("validation error, %", color=SOFT)
    alt = "Validation error of each seed: " + "; ".join(
        f"{r.label} mean {e.mean:.{digits}f} %, from {e.low:.{digits}f} to {e.high:.{digits}f}"
        for r, e in shown
    )
    return Plot(
        "Error of every seed",
        out.svg("spread"),
        alt,
        "A dot is a seed, the upright bar their mean.",
    )


def curve_figures(rows: list[Row], look: dict[Row, Style]) -> list[Plot]:
    """Validation error, losses, loss parts and weights by epoch; only those with something to draw."""
    found = [_error_figure(rows, look), _loss_figure(rows, look), _parts_figure(rows, look)]
    return [figure for figure in found if figure is not None]


def _error_figure(rows: list[Row], look: dict[Row, Style]) -> Plot | None:
    drawn = {row: s for row in rows if (s := series(row.runs, _error))}
    absent = {f"{name} teacher": error for name, error, _ in absent_teachers(rows)}
    if not drawn:
        return None
    with _drawing(9.4, 4.0) as (figure, out):
        axes = figure.add_axes((0.065, 0.13, 0.755, 0.84))
        _lines(axes, drawn, look)
        levels = {name: Series([0], [level], [level], [level]) for name, level in absent.items()}
        _limit(axes, {**drawn, **levels})
        axes.set_xlabel("epoch", color=SOFT)
        axes.set_ylabel("validation error, %", color=SOFT)
        ends = [(short(row.label), s.mean[-1], look[row].colour) for row, s in drawn.items()]
        for name, level in absent.items():
            axes.axhline(level, color=SOFT, ls=(0, (5, 2)), lw=1.3)
            ends.append((name, level, SOFT))
        _name_ends(axes, ends)
    said = "; ".join(f"{row.label} ends at {s.mean[-1]:.1f} %" for row, s in drawn.items())
    return Plot(
        "Validation error", out.svg("error"), f"Validation error by epoch: {said}", _band(rows)
    )


def _loss_figure(rows: list[Row], look: dict[Row, Style]) -> Plot | None:
    panels = {"training": "train_loss", "validation": "val_loss"}
    drawn = {
        n: {r: s for r in rows if (s := series(r.runs, _metric(key)))} for n, key in panels.items()
    }
    if not any(drawn.values()):
        return None
    with _drawing(9.4, 3.3) as (figure, out):
        first: Axes | None = None
        for i, (name, lines) in enumerate(drawn.items()):
            axes = figure.add_axes((0.065 + 0.48 * i, 0.155, 0.44, 0.73), sharey=first)
            first = first or axes
            _lines(axes, lines, look)
            axes.set_title(name, fontsize=10.5, color=INK, loc="left")
            axes.set_xlabel("epoch", color=SOFT)
            axes.tick_params(labelleft=i == 0)
            if i == 0:
                axes.set_ylabel("cross-entropy", color=SOFT)
        everything = {(n, r): s for n, lines in drawn.items() for r, s in lines.items()}
        assert first is not None
        _limit(first, everything)
    alt = (
        "Cross-entropy by epoch, training on the left and validation on the right, for "
        + ", ".join(r.label for r in rows)
    )
    return Plot(
        "Cross-entropy",
        out.svg("loss"),
        alt,
        f"{_band(rows)} A spike above {SPIKE}× the median is cut off.".strip(),
    )


def _parts_figure(rows: list[Row], look: dict[Row, Style]) -> Plot | None:
    """A panel for each part of the loss and for each weight that a schedule moves."""
    pupils = [row for row in rows if row.role != "teacher"]
    panels: list[tuple[str, bool, dict[Row, Series]]] = []
    for key in ("parts", "weights"):
        for name in _names(pupils, key):
            lines = {row: s for row in pupils if (s := series(row.runs, _metric(key, name)))}
            if key == "weights":
                lines = {row: s for row, s in lines.items() if _moves(s)}
            if lines:
                panels.append((name, key == "weights", lines))
    if not panels or [name for name, *_ in panels] == ["ce"]:
        return None
    across = max(2, len(panels)) if len(panels) <= 4 else 3
    down = -(-len(panels) // across)
    with _drawing(9.4, 2.6 * down) as (figure, out):
        for i, (name, weight, lines) in enumerate(panels):
            left, width = 0.055 + (i % across) * 0.95 / across, 0.95 / across - 0.055
            axes = figure.add_axes(
                (left, (down - 1 - i // across + 0.19) / down, width, 0.66 / down)
            )
            _lines(axes, lines, look, layered=weight)
            _limit(axes, lines, whole=weight)
            axes.set_title(
                f"weight {_symbol(name)}" if weight else _symbol(name),
                fontsize=10.5,
                color=INK,
                loc="left",
            )
            axes.set_xlabel("epoch", color=SOFT)
    still = constant_weights(rows)
    caption = "Each panel on its own scale." + (
        f" Weights that stay as they are: {'; '.join(still)}." if still else ""
    )
    alt = "By epoch: " + ", ".join(
        ("weight " if weight else "loss part ") + _symbol(name) for name, weight, _ in panels
    )
    moving = any(weight for _, weight, _ in panels)
    title = "Parts of the training loss" + (", and the weights in effect" if moving else "")
    return Plot(title, out.svg("parts"), alt, caption)


def _names(rows: list[Row], key: str) -> list[str]:
    return list(
        dict.fromkeys(
            n for row in rows for run in row.runs for m in run.metrics for n in (dig(m, key) or {})
        )
    )


def constant_weights(rows: list[Row]) -> list[str]:
    """`AT: β = 1000` for the weights that no schedule moves."""
    lines = []
    for row in rows:
        found = [(n, series(row.runs, _metric("weights", n))) for n in _names([row], "weights")]
        still = [
            f"{_symbol(n)} = {setting(round(s.mean[0], 6))}"
            for n, s in found
            if s and not _moves(s)
        ]
        if still:
            lines.append(f"{row.label}: {', '.join(still)}")
    return lines


def _symbol(name: str) -> str:
    method, _, option = name.rpartition(".")  # `at.beta` where several methods have one
    symbol = {"beta": "β", "alpha": "α", "ce": "cross-entropy"}.get(option, option)
    return f"{symbol} of {method}" if method else symbol


def _moves(line: Series) -> bool:
    low, high = min(line.low), max(line.high)
    return high - low > 1e-6 * max(abs(low), abs(high))


def _band(rows: list[Row]) -> str:
    return (
        "Line: mean over the seeds; band: lowest to highest."
        if any(len(r.runs) > 1 for r in rows)
        else ""
    )


def _lines(
    axes: Axes, drawn: dict[Row, Series], look: dict[Row, Style], layered: bool = False
) -> None:
    """Draws the lines and their bands; `layered` ones lie wide below narrow, so that equal ones are all seen."""
    from matplotlib.ticker import MaxNLocator

    for i, (row, line) in enumerate(drawn.items()):
        style = look[row]
        marker: dict[str, Any] = {"marker": "o", "ms": 4} if len(line.epochs) < 3 else {}
        if line.low != line.high:
            axes.fill_between(
                line.epochs, line.low, line.high, color=style.colour, alpha=0.16, lw=0
            )
        width = (
            1.9 + min(2.4, 5 / len(drawn)) * (len(drawn) - 1 - i)
            if layered
            else 1.6
            if row.role == "teacher"
            else 1.9
        )
        axes.plot(line.epochs, line.mean, color=style.colour, ls=style.dash, lw=width, **marker)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.margins(x=0.015)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _limit(axes: Axes, drawn: dict[Any, Series], whole: bool = False) -> None:
    """Leaves the wild first epochs of a long run, and a spike far above all else, outside; `whole` shows all."""
    last = max((s.epochs[-1] for s in drawn.values()), default=0)
    early = 0 if whole or last < 20 else last / 6
    tops = [
        h
        for s in drawn.values()
        for e, h in zip(s.epochs, s.high, strict=True)
        if e >= early or e == s.epochs[-1]
    ]
    lows = [v for s in drawn.values() for v in s.low]
    top, low = max(tops, default=1.0), min(lows, default=0.0)
    if not whole and tops:
        top = min(top, SPIKE * statistics.median(tops))
    room = 0.06 * (top - low) or 0.06 * abs(top) or 1.0
    axes.set_ylim(max(0.0, low - room) if low >= 0 else low - room, top + room)


def _name_ends(axes: Axes, ends: list[tuple[str, float, str]]) -> None:
    """Writes (name, height, colour) beside the lines' ends, moved apart where ends lie close together."""
    low, high = axes.get_ylim()
    gap = 0.062 * (high - low)
    ends = sorted(ends, key=lambda end: end[1])
    places: list[float] = []
    for _, y, _ in ends:
        places.append(max(y, places[-1] + gap if places else low))
    ceiling = high
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - gap
    for (name, _, colour), y in zip(ends, places, strict=True):
        text = name if len(name) <= 22 else name[:21] + "…"
        where: dict[str, Any] = {
            "xycoords": ("axes fraction", "data"),
            "va": "center",
            "annotation_clip": False,
        }
        axes.annotate(text, (1.012, y), fontsize=10, color=colour, fontweight="bold", **where)


class _Sheet:
    """The drawing once it is done."""

    def __init__(self) -> None:
        self.text = ""

    def svg(self, name: str) -> str:
        return _inline(self.text, name)


@contextmanager
def _drawing(width: float, height: float) -> Iterator[tuple[Figure, _Sheet]]:
    """A figure of so many inches, written as SVG when the block ends; matplotlib's settings are put back."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    sheet = _Sheet()
    ours: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "attention-transfer", "font.size": 9.5, "font.family": "DejaVu Sans",
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GRID, "axes.facecolor": "none",
        "xtick.color": SOFT, "ytick.color": SOFT, "text.color": INK, "axes.axisbelow": True, "text.parse_math": False,
    }  # fmt: skip
    with matplotlib.rc_context(ours):
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        yield figure, sheet
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        sheet.text = buffer.getvalue()


def _inline(svg: str, name: str) -> str:
    """The drawing as part of a page: ids of its own, the page's colours, no size, no address."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    head, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    head = f'<svg {box.group() if box else ""} aria-hidden="true" focusable="false"'
    rest = re.sub(r'\bid="', f'id="{name}-', rest)
    rest = (
        rest.replace("url(#", f"url(#{name}-")
        .replace('href="#', f'href="#{name}-')
        .replace("xlink:href", "href")
    )
    svg = re.sub(
        r"#0a0b([0-9a-f]{2})", lambda m: f"var(--c{int(m.group(1), 16)})", f"{head}>{rest}"
    )
    for stand_in, variable in (
        (INK, "--ink"),
        (SOFT, "--soft"),
        (GRID, "--grid"),
        (PAPER, "--paper"),
    ):
        svg = svg.replace(stand_in, f"var({variable})")
    svg = re.sub(r"(\d\.\d{2})\d+", r"\1", svg)
    return re.sub(r"\s*\n\s*", "\n", svg)
