"""Attention maps over their images: tiles for the page, and one PNG for the `maps` command."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..run_folder import replacing
from .load_run import Maps
from .rows import Row

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

TILE = 96
"""About how many pixels a tile is wide; small images are enlarged by a whole number."""


@dataclass
class MapColumn:
    """One network in the figure of `maps`: maps[stage] is (K, h, w), predictions K class names or None."""

    title: str
    predictions: Sequence[str] | None
    maps: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Strip:
    """One network's maps of one image, its stages side by side; `source` is a data address."""

    source: str
    alt: str
    prediction: str
    right: bool | None


@dataclass(frozen=True)
class Picture:
    """A row of the grid: the image, its class, and a strip (or None) for each column."""

    source: str
    alt: str
    label: str
    strips: list[Strip | None]


@dataclass(frozen=True)
class Grid:
    """The grid of maps: `columns` are (row, stages) in the order of each picture's strips."""

    columns: list[tuple[Row, list[str]]]
    pictures: list[Picture]
    aspect: float
    boxed: bool
    chosen: str

    @property
    def tile_pixels(self) -> int:
        """How high the page shows a tile, so that a row of them fits its width."""
        tiles = 1 + sum(len(stages) for _, stages in self.columns)
        return max(
            48, min(TILE, int((1060 - 20 * len(self.columns)) / (tiles * max(1.0, self.aspect))))
        )


def tile_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) in pixels of a tile for an image of that size."""
    longest = max(height, width)
    factor = max(1, round(TILE / longest)) if longest <= TILE else TILE / longest
    return max(1, round(height * factor)), max(1, round(width * factor))


def enlarge(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image (H, W, 3) uint8 at the tile's size; pixels stay square-edged when it grows."""
    import numpy as np
    from PIL import Image

    height, width = size
    method = Image.Resampling.NEAREST if height >= image.shape[0] else Image.Resampling.LANCZOS
    return np.asarray(
        Image.fromarray(np.ascontiguousarray(image, dtype=np.uint8)).resize((width, height), method)
    )


def overlay(image: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """The map (h, w), scaled by its own greatest value, in `inferno` over the dimmed grey image (H, W, 3) uint8."""
    import numpy as np
    from matplotlib import colormaps
    from PIL import Image

    height, width = image.shape[:2]
    heat = np.nan_to_num(np.asarray(attention, dtype=np.float32), posinf=0.0, neginf=0.0)
    heat = heat / heat.max() if heat.max() > 0 else np.zeros_like(heat)
    heat = np.asarray(
        Image.fromarray(heat).resize((width, height), Image.Resampling.BILINEAR)
    ).clip(0, 1)
    grey = (image @ np.array([0.299, 0.587, 0.114]) / 255)[..., None]
    colour = colormaps["inferno"](heat)[..., :3]
    opacity = (0.45 + 0.4 * heat)[..., None]
    return (255 * ((1 - opacity) * grey * 0.8 + opacity * colour)).clip(0, 255).astype(np.uint8)


def boxed(tile: np.ndarray, box: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The tile with the object's box (x0, y0, x1, y1 in pixels of an image of `shape`) drawn on it."""
    import numpy as np
    from PIL import Image, ImageDraw

    scale_y, scale_x = tile.shape[0] / shape[0], tile.shape[1] / shape[1]
    x0, y0, x1, y1 = box[0] * scale_x, box[1] * scale_y, box[2] * scale_x - 1, box[3] * scale_y - 1
    canvas = Image.fromarray(tile.copy())
    if x1 > x0 and y1 > y0:
        draw = ImageDraw.Draw(canvas)
        draw.rectangle((x0, y0, x1, y1), outline=(0, 0, 0), width=3)
        draw.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline=(255, 255, 255), width=1)
    return np.asarray(canvas)


def _data_address(pixels: np.ndarray, colours: int | None = None) -> str:
    """(H, W, 3) uint8 as a PNG in a data: address, of so many colours where the page should stay small."""
    from PIL import Image

    image = Image.fromarray(pixels)
    if colours is not None:
        image = image.quantize(colours, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def grid(rows: list[Row], limit: int = 8) -> Grid | None:
    """The maps of each row's first seed that has some, over the images of the first of them; None without maps."""
    found = [
        (row, maps)
        for row in rows
        if (maps := next((r.maps for r in row.runs if r.maps), None)) is not None
    ]
    if not found:
        return None
    reference = found[0][1]
    places = [{_fingerprint(maps, i): i for i in range(len(maps))} for _, maps in found]
    wanted = [_fingerprint(reference, i) for i in range(len(reference))]
    indices = [[place.get(key) for place in places] for key in wanted]
    verdicts = [
        [m.right(i) for (_, m), i in zip(found, line, strict=True) if i is not None]
        for line in indices
    ]
    chosen = choose(verdicts, limit)
    pictures = [_picture(found, indices[k], reference, k) for k in chosen]
    mixed = sum(len(set(verdicts[k])) > 1 for k in chosen)
    words = f"{len(chosen)} of {len(reference)} stored validation images"
    if len(chosen) < len(reference):
        how = (
            f"those first on which the settings disagree ({mixed} here)"
            if len(found) > 1
            else "right and wrong by turns"
        )
        words += f", {how}, so they are not a fair sample"
    columns = [(row, maps.stages) for row, maps in found]
    height, width = reference.images.shape[1:3]
    return Grid(
        columns,
        pictures,
        round(width / height, 3),
        any(any(reference.boxes[k]) for k in chosen),
        words,
    )


def _fingerprint(maps: Maps, index: int) -> tuple[bytes, str]:
    return maps.images[index].tobytes(), maps.labels[index]


def choose(verdicts: list[list[bool]], limit: int = 8) -> list[int]:
    """Indices of up to `limit` images, in order: mixed verdicts first, then all wrong and all right by turns."""
    mixed = [i for i, v in enumerate(verdicts) if len(set(v)) > 1]
    wrong = [i for i, v in enumerate(verdicts) if v and not any(v)]
    right = [i for i, v in enumerate(verdicts) if v and all(v)]
    room = limit - 2 if wrong or right else limit
    first, later = mixed[:room], mixed[room:]
    turns = [
        i
        for k in range(max(len(wrong), len(right)))
        for i in (*wrong[k : k + 1], *right[k : k + 1])
    ]
    return sorted([*first, *turns, *later][:limit])


def _picture(
    found: list[tuple[Row, Maps]], indices: list[int | None], reference: Maps, k: int
) -> Picture:
    import numpy as np

    image, label = reference.images[k], reference.labels[k]
    size = tile_size(*image.shape[:2])
    large = enlarge(image, size)
    strips: list[Strip | None] = []
    for (row, maps), i in zip(found, indices, strict=True):
        if i is None:
            strips.append(None)
            continue
        gap = np.full((size[0], 4, 3), 127, np.uint8)
        tiles = [overlay(large, stage[i]) for stage in maps.maps]
        joined = np.concatenate([part for tile in tiles for part in (gap, tile)][1:], axis=1)
        right = maps.right(i) if maps.predictions[i] and maps.labels[i] else None
        alt = f"Attention of {row.label} at {', '.join(maps.stages)} over an image of {label or 'unknown class'}"
        strips.append(Strip(_data_address(joined, 96), alt, maps.predictions[i], right))
    shown = boxed(large, reference.boxes[k], image.shape[:2])
    alt = f"Validation image of {label or 'unknown class'}"
    return Picture(_data_address(shown), alt, label, strips)


def save_maps_figure(columns: list[MapColumn], images: np.ndarray, out: Path) -> None:
    """Writes a PNG: a row an image (K, H, W, 3 uint8), then each column's stages as maps over it.

    Raises:
        UserError: where there is nothing to draw, or a column's maps do not belong to the images.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    images = np.asarray(images)
    _check(columns, images)
    layout = _Layout(columns, tile_size(*images.shape[1:3]), len(images))
    canvas = np.full((layout.height, layout.width, 3), 255, np.uint8)
    for k, image in enumerate(images):
        large = enlarge(image, layout.tile)
        layout.put(canvas, large, layout.margin, k)
        for column, lefts in zip(columns, layout.lefts, strict=True):
            for left, attention in zip(lefts, column.maps.values(), strict=True):
                layout.put(canvas, overlay(large, attention[k]), left, k)
    figure = Figure(figsize=(layout.width / 100, layout.height / 100), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(
        canvas, interpolation="nearest", aspect="auto", extent=(0, layout.width, layout.height, 0)
    )
    layout.write(axes, columns)
    with replacing(Path(out)) as partial:
        figure.savefig(partial, format="png", dpi=100)


def _check(columns: list[MapColumn], images: np.ndarray) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or not len(images) or not columns:
        raise UserError(
            f"no maps to draw: {len(columns)} networks, images of shape {tuple(images.shape)}"
        )
    for column in columns:
        for stage, maps in column.maps.items():
            if maps.ndim != 3 or len(maps) != len(images):
                raise UserError(
                    f"maps of {column.title} at {stage} have shape {maps.shape}, expected ({len(images)}, h, w)"
                )
        if column.predictions is not None and len(column.predictions) != len(images):
            raise UserError(
                f"{column.title} has {len(column.predictions)} predictions for {len(images)} images"
            )


class _Layout:
    """Where everything in the figure of `maps` lies, in pixels; `lefts[column]` holds an x for each stage."""

    def __init__(self, columns: list[MapColumn], tile: tuple[int, int], count: int) -> None:
        self.tile, self.margin, self.top, self.between = tile, 12, 46, 4
        self.words = 20 if any(column.predictions for column in columns) else 0
        self.lefts: list[list[int]] = []
        x = self.margin + tile[1] + 16
        for column in columns:
            self.lefts.append([x + i * (tile[1] + self.between) for i in range(len(column.maps))])
            x += max(1, len(column.maps)) * (tile[1] + self.between) + 14
        self.width = x - 14 - self.between + self.margin
        self.height = self.top + count * self.pitch + self.margin
        if max(self.width, self.height) >= 2**16:
            raise UserError(
                f"a figure of {self.width} x {self.height} pixels is too large: give fewer images or networks"
            )

    @property
    def pitch(self) -> int:
        return self.tile[0] + self.words + 8

    def put(self, canvas: np.ndarray, tile: np.ndarray, left: int, row: int) -> None:
        y = self.top + row * self.pitch
        canvas[y : y + self.tile[0], left : left + self.tile[1]] = tile

    def write(self, axes: Axes, columns: list[MapColumn]) -> None:
        """Titles and stages above the columns, predictions below each strip."""
        plain: dict[str, Any] = {"color": "#111827", "clip_on": True, "parse_math": False}
        axes.text(self.margin, 36, "image", fontsize=7, **plain)
        for column, lefts in zip(columns, self.lefts, strict=True):
            if not lefts:
                continue
            room = lefts[-1] + self.tile[1] - lefts[0]
            axes.text(
                lefts[0], 19, _fit(column.title, room / 7.5), fontsize=9, fontweight="bold", **plain
            )
            for left, stage in zip(lefts, column.maps, strict=True):
                axes.text(left, 36, _fit(stage, self.tile[1] / 5.6), fontsize=7, **plain)
            for k, name in enumerate(column.predictions or ()):
                y = self.top + k * self.pitch + self.tile[0] + 13
                axes.text(lefts[0], y, _fit(str(name), room / 6), fontsize=7.5, **plain)


def _fit(text: str, characters: float) -> str:
    room = max(3, int(characters))
    return text if len(text) <= room else text[: room - 1] + "…"
