"""The figure of attention maps: a row for each image, tiles for each network's maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..run_folder import is_special, replacing
from .formats import significant, truncate
from .pictures import MAP_COLOURS, TILE, finite_map, make_tile, overlay, tile_size

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = (".png", ".svg", ".pdf")
DPI = 100
INK, SOFT = "#111827", "#4b5563"
# Lengths in pixels.
MARGIN = 12
HEADER = 46  # the titles of networks and stages
STAGE_GAP = 4  # between the stages of a network
NETWORK_GAP = 17
LINE = 14  # a line of text below a tile
SCALE_HEIGHT, SCALE_WIDTH = 42, 150  # the colour scale at the bottom


@dataclass
class MapColumn:
    """One network in the figure of maps: maps[stage] is (K, h, w), predictions K class names."""

    title: str
    predictions: Sequence[str] | None
    maps: dict[str, np.ndarray]


@dataclass
class _Layout:
    """The positions of tiles and texts, in pixels from the top left."""

    tile: tuple[int, int]  # height and width
    spans: list[tuple[int, int]]  # left and right of each network
    row: int  # from one image to the next
    width: int
    height: int


def maps_figure(columns: list[MapColumn], images: np.ndarray, tile: int = TILE) -> Figure:
    """A figure with a row for each image (K, H, W, 3) uint8 and its maps of each network.

    Each map is scaled by its own maximum, which is written below it.

    Args:
        tile: the longer side of an image in the figure, in pixels.

    Raises:
        UserError: if there is nothing to draw, the maps do not belong to the images, or the figure
            is too large.
    """
    import numpy as np
    from matplotlib.figure import Figure

    images = np.asarray(images)
    _check_columns(columns, images)
    layout = _lay_out(columns, images, tile)
    figure = Figure(figsize=(layout.width / DPI, layout.height / DPI), dpi=DPI, facecolor="white")
    # One Axes for all tiles, in pixels: an Axes for each tile would be slow.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    _write_titles(axes, columns, layout)
    for k, image in enumerate(images):
        top = HEADER + k * layout.row
        small = make_tile(image, tile)
        _draw_tile(axes, small, MARGIN, top)
        for column, (left, right) in zip(columns, layout.spans, strict=True):
            x = left
            below = top + layout.tile[0]
            for maps in column.maps.values():
                _draw_tile(axes, overlay(small, maps[k]), x, top)
                maximum = significant(float(finite_map(maps[k]).max()), 2)
                _write(axes, maximum, x, below + 10, layout.tile[1], size=6, color=SOFT)
                x += layout.tile[1] + STAGE_GAP
            if column.predictions is not None:
                _write(axes, str(column.predictions[k]), left, below + LINE + 10, right - left)
    _draw_scale(axes, MARGIN, layout.height - MARGIN - SCALE_HEIGHT + 12)
    # `imshow` changes the limits with every image.
    axes.set(xlim=(0, layout.width), ylim=(layout.height, 0), aspect="auto")
    return figure


def _lay_out(columns: list[MapColumn], images: np.ndarray, tile: int) -> _Layout:
    height, width = tile_size(images.shape[1], images.shape[2], tile)
    right = MARGIN + width
    spans = []
    for column in columns:
        left = right + NETWORK_GAP
        stages = max(1, len(column.maps))  # a network without maps takes the space of one
        right = left + stages * (width + STAGE_GAP) - STAGE_GAP
        spans.append((left, right))
    row = height + LINE + 8
    if any(column.predictions for column in columns):
        row += LINE
    # A narrow figure is widened to the colour scale.
    total_width = max(right, MARGIN + SCALE_WIDTH) + MARGIN
    total_height = HEADER + len(images) * row + SCALE_HEIGHT + MARGIN
    if max(total_width, total_height) >= 2**16:  # the limit of matplotlib's renderer
        raise UserError(
            f"a figure of {total_width} x {total_height} pixels is too large: "
            "give fewer images or networks"
        )
    return _Layout((height, width), spans, row, total_width, total_height)


def _write_titles(axes: Axes, columns: list[MapColumn], layout: _Layout) -> None:
    tile_width = layout.tile[1]
    _write(axes, "image", MARGIN, 36, tile_width)
    for column, (left, right) in zip(columns, layout.spans, strict=True):
        _write(axes, column.title, left, 19, right - left, size=9, fontweight="bold")
        for i, stage in enumerate(column.maps):
            _write(axes, stage, left + i * (tile_width + STAGE_GAP), 36, tile_width)


def _draw_tile(axes: Axes, pixels: np.ndarray, x: int, y: int) -> None:
    """Pixels with their top left corner at x and y."""
    height, width = pixels.shape[:2]
    axes.imshow(pixels, extent=(x, x + width, y + height, y), interpolation="none")


def _write(axes: Axes, text: str, x: int, y: int, room: int, size: float = 7, **style: Any) -> None:
    """Writes text, truncated to `room`, at x and y."""
    text = truncate(text, max(2, int(room / (0.82 * size))))  # the mean width of a letter
    # A class may be called `$5`, which is not a formula.
    style.setdefault("color", INK)
    axes.text(x, y, text, fontsize=size, parse_math=False, **style)


def _draw_scale(axes: Axes, x: int, y: int) -> None:
    """The colours from 0 to the maximum of a map."""
    import numpy as np
    from matplotlib import colormaps

    ramp = np.broadcast_to(np.linspace(0, 1, SCALE_WIDTH), (8, SCALE_WIDTH))
    _draw_tile(axes, colormaps[MAP_COLOURS](ramp, bytes=True)[..., :3], x, y)
    _write(axes, "0", x, y + 19, 20, size=6, color=SOFT)
    style: dict[str, Any] = {"color": SOFT, "ha": "right"}
    _write(axes, "maximum (below each map)", x + SCALE_WIDTH, y + 19, SCALE_WIDTH, 6, **style)


def save_maps_figure(columns: list[MapColumn], images: np.ndarray, out: Path) -> None:
    """Writes `maps_figure` to a file.

    Raises:
        UserError: as `maps_figure`, and if `out` has another extension than .png, .svg and .pdf.
    """
    check_figure_file(out)
    figure = maps_figure(columns, images)
    form = Path(out).suffix.lower().removeprefix(".") or "png"  # a pipe has no extension
    with replacing(Path(out)) as partial:
        figure.savefig(partial, format=form)


def check_figure_file(out: Path) -> None:
    """Raises `UserError` unless `out` has the extension of a figure."""
    if Path(out).suffix.lower() not in FIGURES and not is_special(Path(out)):
        raise UserError(f"--out {out}: expected a figure, a file ending in {', '.join(FIGURES)}")


def _check_columns(columns: list[MapColumn], images: np.ndarray) -> None:
    count = len(images)
    if images.ndim != 4 or images.shape[-1] != 3 or not count or not columns:
        raise UserError(f"no maps to draw: {len(columns)} networks, images of shape {images.shape}")
    for column in columns:
        for stage, maps in column.maps.items():
            if maps.ndim != 3 or len(maps) != count:
                shape = f"({count}, h, w)"
                raise UserError(
                    f"maps of {column.title} at {stage} have shape {maps.shape}, expected {shape}"
                )
        if column.predictions is not None and len(column.predictions) != count:
            predictions = len(column.predictions)
            raise UserError(f"{column.title} has {predictions} predictions for {count} images")
