"""The charts of a report: for its page, and as figures for Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .curves import Style, error_chart, loss_chart, make_styles, parts_chart, spread_chart
from .grouping import group_runs
from .load_run import LoadedRun
from .rows import SettingRow
from .svg import Drawing, draw_chart
from .teachers import with_teachers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE_FILE = Path(__file__).with_name("charts.mplstyle")
CURVES = {"error": error_chart, "loss": loss_chart, "parts": parts_chart}


def page_charts(
    rows: list[SettingRow], styles: dict[SettingRow, Style]
) -> tuple[Drawing | None, list[Drawing]]:
    """The errors of the seeds, and the curves by epoch; those that have data."""
    with chart_style():
        spread = spread_chart(rows, styles)
        curves = [draw(rows, styles) for draw in CURVES.values()]
        drawings = [draw_chart(chart, styles) for chart in curves if chart is not None]
        if spread is None:
            return None, drawings
        return draw_chart(spread, styles), drawings


def convergence_figure(runs: list[LoadedRun], metric: str) -> Figure:
    """One of the page's curves as a figure of its own; `metric` is a key of CURVES.

    Raises:
        UserError: if no run has this metric.
    """
    rows = with_teachers(group_runs(runs))
    with chart_style():
        chart = CURVES[metric](rows, make_styles(rows))
    if chart is None:
        folders = ", ".join(str(run.folder) for run in runs)
        raise UserError(f"no {metric} to draw in {folders}: no epoch is finished")
    chart.figure.set_facecolor("white")  # the text is dark, and a notebook may be dark
    return chart.figure


@contextmanager
def chart_style() -> Iterator[None]:
    """The report's style instead of the user's own settings."""
    import matplotlib

    with matplotlib.rc_context(fname=STYLE_FILE):
        yield
