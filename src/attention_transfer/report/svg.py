"""Charts as inline SVG, with the page's colours, and data about their axes for its script."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .curves import GRID, INK, PAPER, SETTING_COLOURS, SOFT, Chart, Panel, Style
from .rows import SettingRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of charts, by their name in the page.
PAGE_COLOURS = {"ink": INK, "soft": SOFT, "grid": GRID, "paper": PAPER}
PAGE_COLOURS |= {f"c{index}": colour for index, colour in enumerate(SETTING_COLOURS)}


@dataclass(frozen=True)
class Drawing:
    """A chart in the page. `data` is for the script: sizes in units of the SVG's view box."""

    title: str
    svg: str
    alt: str
    caption: str
    data: dict[str, Any]


def draw_chart(chart: Chart, styles: dict[SettingRow, Style]) -> Drawing:
    """The chart as markup, with the data that the page needs to mark an epoch."""
    svg = _svg(chart.figure, chart.name)
    # After drawing, the positions of the axes are final.
    panels = [_panel_data(axes, panel, [*styles]) for axes, panel in chart.panels]
    width, height = _size(chart.figure)
    data = {"name": chart.name, "width": width, "height": height, "panels": panels}
    return Drawing(chart.title, svg, chart.alt, chart.caption, data)


def _size(figure: Figure) -> tuple[float, float]:
    """Width and height in points, which are the units of the view box."""
    width, height = (round(72 * inches, 2) for inches in figure.get_size_inches())
    return width, height


def _panel_data(axes: Axes, panel: Panel, rows: list[SettingRow]) -> dict[str, Any]:
    """The position of the axes, their range of epochs, and the values of each row's line."""
    assert axes.figure is not None
    width, height = _size(axes.figure.get_figure(root=True))
    place = axes.get_position()
    lines = []
    for row, line in panel.lines.items():
        values = [float(f"{value:.4g}") for value in line.mean]
        lines.append({"row": rows.index(row), "epochs": line.epochs, "values": values})
    return {
        "title": panel.title,
        "left": round(place.x0 * width, 2),
        "right": round(place.x1 * width, 2),
        "top": round((1 - place.y1) * height, 2),
        "bottom": round((1 - place.y0) * height, 2),
        "epochs": [round(limit, 4) for limit in axes.get_xlim()],
        "lines": lines,
    }


def _svg(figure: Figure, name: str) -> str:
    """The figure as SVG markup for a page: unique ids, the page's colours, no fixed size."""
    buffer = io.StringIO()
    # Without a date, the same runs give the same page.
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=no_metadata)
    # An inline SVG needs no XML declaration, and the page sets its size.
    content = re.sub(r"^.*?<svg[^>]*>", "", buffer.getvalue(), count=1, flags=re.DOTALL)
    width, height = _size(figure)
    head = f'<svg viewBox="0 0 {width:g} {height:g}" aria-hidden="true" focusable="false">'
    # Several marks belong to one row, but ids must be unique.
    content = re.sub(r'\bid="row-(\d+)"', r'data-row="\1"', content)
    content = content.replace("xlink:href", "href")
    # Every figure has a `figure_1`, but ids must be unique in a page.
    content = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{name}-", content)
    for variable, colour in PAGE_COLOURS.items():
        content = content.replace(colour, f"var(--{variable})")
    return head + re.sub(r"\s*\n\s*", "\n", content)
