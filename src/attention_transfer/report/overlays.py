"""Attention maps drawn over their images: for the report's page, and as the figure of `maps`."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..run_folder import is_special, replacing
from .formats import truncate
from .load_run import StoredMaps
from .rows import SettingRow

if TYPE_CHECKING:
    import numpy as np

# Lengths in pixels.
TILE = 96  # about the longer side of an image
STAGE_GAP = 4  # between the stages of a network
PAGE_WIDTH = 1060  # for the tiles of an image in the page

# The figure of `maps`.
FIGURES = (".png", ".svg", ".pdf")
DPI = 100
INK = "#111827"


def tile_size(height: int, width: int) -> tuple[int, int]:
    """The (height, width) in pixels at which an image of this size is shown."""
    scale = TILE / max(height, width)
    if scale >= 1:
        scale = round(scale)  # by a whole number all pixels of a small image grow alike
    return max(1, round(height * scale)), max(1, round(width * scale))


def make_tile(image: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) uint8 at its tile's size; enlarged pixels keep sharp edges."""
    import numpy as np
    from PIL import Image

    height, width = tile_size(*image.shape[:2])
    method = Image.Resampling.LANCZOS
    if height >= image.shape[0]:
        method = Image.Resampling.NEAREST
    picture = Image.fromarray(np.ascontiguousarray(image, dtype=np.uint8))
    return np.asarray(picture.resize((width, height), method))


def overlay(image: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """A map (h, w) in the colours of `inferno` over the dimmed grey image (H, W, 3) uint8.

    The map is scaled by its own maximum; values that are not finite count as zero.
    """
    import numpy as np
    from matplotlib import colormaps
    from PIL import Image

    height, width = image.shape[:2]
    heat = np.nan_to_num(np.asarray(attention, dtype=np.float32), posinf=0.0, neginf=0.0)
    if heat.max() > 0:
        heat = heat / heat.max()
    smooth = Image.fromarray(heat).resize((width, height), Image.Resampling.BILINEAR)
    heat = np.asarray(smooth).clip(0, 1)
    grey = (image @ np.array([0.299, 0.587, 0.114]) / 255)[..., None]  # luma of ITU-R BT.601
    colour = colormaps["inferno"](heat)[..., :3]
    # The image stays visible below the strongest attention, and the colour where there is none.
    opacity = (0.45 + 0.4 * heat)[..., None]
    blended = (1 - opacity) * grey * 0.8 + opacity * colour
    return (255 * blended).clip(0, 255).astype(np.uint8)


def strip(tile: np.ndarray, maps: Iterable[np.ndarray], background: int) -> np.ndarray:
    """The maps (h_s, w_s) of one image over its tile, side by side with gaps of this grey."""
    import numpy as np

    gap = np.full((len(tile), STAGE_GAP, 3), background, np.uint8)
    parts = []
    for attention in maps:
        parts += [gap, overlay(tile, attention)]
    return np.concatenate(parts[1:], axis=1)


def draw_box(tile: np.ndarray, box: np.ndarray, image_shape: tuple[int, ...]) -> np.ndarray:
    """The tile with the object's box (x0, y0, x1, y1 in pixels of the image) drawn on it."""
    import numpy as np
    from PIL import Image, ImageDraw

    scale_y, scale_x = tile.shape[0] / image_shape[0], tile.shape[1] / image_shape[1]
    # The box is half-open; ImageDraw includes the last pixel.
    x0, y0, x1, y1 = box[0] * scale_x, box[1] * scale_y, box[2] * scale_x - 1, box[3] * scale_y - 1
    canvas = Image.fromarray(tile.copy())
    if x1 > x0 and y1 > y0:
        draw = ImageDraw.Draw(canvas)
        # White within black is visible on any image.
        draw.rectangle((x0, y0, x1, y1), outline=(0, 0, 0), width=3)
        draw.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline=(255, 255, 255), width=1)
    return np.asarray(canvas)


@dataclass(frozen=True)
class Picture:
    """A picture of the page: an image, or one network's maps of it; `source` is a data: address."""

    source: str
    alt: str
    class_name: str
    is_correct: bool | None = None


@dataclass(frozen=True)
class MapGrid:
    """The page's table of maps: for each image its picture, and one for each network's maps."""

    networks: list[tuple[SettingRow, list[str]]]  # with the names of the stages
    rows: list[tuple[Picture, list[Picture]]]
    aspect: float  # width / height of an image
    has_boxes: bool
    selection: str

    @property
    def tile_height(self) -> int:
        """The height at which the page shows a tile, so that a row of tiles fits its width."""
        tiles = 1 + sum(len(stages) for _, stages in self.networks)
        room = PAGE_WIDTH - 20 * len(self.networks)  # 20 pixels of padding
        return max(TILE // 2, min(TILE, int(room / (tiles * max(1.0, self.aspect)))))


def map_grids(rows: list[SettingRow], limit: int = 8) -> list[MapGrid]:
    """The maps that the first seed of each row stored, of up to `limit` images.

    Networks whose runs stored the same images share a grid, of the images that all of them have.
    """
    waiting: list[tuple[SettingRow, StoredMaps]] = []
    for row in rows:
        maps = _stored_maps(row, rows)
        if maps is not None:
            waiting.append((row, maps))
    grids = []
    while waiting:
        images = set(waiting[0][1].index_of)
        members, others = [], []
        for row, maps in waiting:
            common = images & maps.index_of.keys()
            # A few images in common are too few to show: the rest goes into another grid.
            if len(common) >= min(limit // 2, len(images), len(maps.index_of)):
                images = common
                members.append((row, maps))
            else:
                others.append((row, maps))
        # In the order of the file: a set has none.
        ordered = [image for image in members[0][1].index_of if image in images]
        grids.append(_map_grid(members, ordered, limit))
        waiting = others
    return grids


def _stored_maps(row: SettingRow, rows: list[SettingRow]) -> StoredMaps | None:
    """The maps of a row; those of a teacher come from its students' runs, if they have any."""
    for student in rows:
        if row.role == "teacher" and student.teacher is row:
            for run in student.runs:
                if run.teacher_maps is not None:
                    return run.teacher_maps
    return next((run.maps for run in row.runs if run.maps is not None), None)


def _map_grid(
    networks: list[tuple[SettingRow, StoredMaps]], images: list[tuple[bytes, str]], limit: int
) -> MapGrid:
    reference = networks[0][1]
    verdicts = []
    for image in images:
        verdicts.append([maps.is_correct(maps.index_of[image]) for _, maps in networks])
    chosen = choose(verdicts, limit)
    grid_rows, boxes = [], []
    for image in [images[k] for k in chosen]:
        pictures = [_maps_picture(row, maps, image) for row, maps in networks]
        grid_rows.append((_image_picture(reference, image), pictures))
        boxes.append(reference.boxes[reference.index_of[image]])
    height, width = reference.images.shape[1:3]
    return MapGrid(
        networks=[(row, maps.stages) for row, maps in networks],
        rows=grid_rows,
        aspect=round(width / height, 3),
        has_boxes=any(box.any() for box in boxes),
        selection=_selection(verdicts, chosen, len(networks)),
    )


def choose(verdicts: list[list[bool]], limit: int = 8) -> list[int]:
    """The indices of up to `limit` images: mixed verdicts, then all wrong and all right in turn."""
    mixed, wrong, right = [], [], []
    for k, verdict in enumerate(verdicts):
        if True in verdict and False in verdict:
            mixed.append(k)
        elif True in verdict:
            right.append(k)
        elif False in verdict:
            wrong.append(k)
    in_turn: list[int] = []
    for pair in zip_longest(wrong, right):
        in_turn += [k for k in pair if k is not None]
    # Two places are for images on which all networks agree.
    places = limit - 2 if in_turn else limit
    return sorted([*mixed[:places], *in_turn, *mixed[places:]][:limit])


def _selection(verdicts: list[list[bool]], chosen: list[int], networks: int) -> str:
    """How the shown images were chosen."""
    text = f"{len(chosen)} of {len(verdicts)} stored validation images"
    if len(chosen) == len(verdicts):
        return text
    rule = "right and wrong predictions in turn"
    if networks > 1:
        mixed = sum(len(set(verdicts[k])) > 1 for k in chosen)
        rule = f"first those on which the settings disagree ({mixed} of them)"
    return f"{text}, {rule}, so they are not a fair sample"


def _image_picture(maps: StoredMaps, image: tuple[bytes, str]) -> Picture:
    k = maps.index_of[image]
    pixels, label = maps.images[k], maps.labels[k]
    source = _data_address(draw_box(make_tile(pixels), maps.boxes[k], pixels.shape))
    return Picture(source, f"Validation image of {label or 'unknown class'}", label)


def _maps_picture(row: SettingRow, maps: StoredMaps, image: tuple[bytes, str]) -> Picture:
    k = maps.index_of[image]
    # Grey gaps suit a light and a dark page.
    pixels = strip(make_tile(maps.images[k]), [stage_maps[k] for stage_maps in maps.maps], 127)
    label, prediction = maps.labels[k], maps.predictions[k]
    stages = ", ".join(maps.stages)
    alt = f"Attention of {row.label} at {stages} over an image of {label or 'unknown class'}"
    is_correct = maps.is_correct(k) if label and prediction else None
    # 96 of the colours of `inferno` look like all of them and keep the page small.
    return Picture(_data_address(pixels, colours=96), alt, prediction, is_correct)


def _data_address(pixels: np.ndarray, colours: int | None = None) -> str:
    """(H, W, 3) uint8 as a PNG in a data: address, its palette limited to `colours`."""
    from PIL import Image

    image = Image.fromarray(pixels)
    if colours is not None:
        image = image.quantize(colours, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


@dataclass
class MapColumn:
    """One network in the figure of `maps`: maps[stage] is (K, h, w), predictions K class names."""

    title: str
    predictions: Sequence[str] | None
    maps: dict[str, np.ndarray] = field(default_factory=dict)


def save_maps_figure(columns: list[MapColumn], images: np.ndarray, out: Path) -> None:
    """Writes a figure with a row for each image (K, H, W, 3 uint8) and its maps of each network.

    Raises:
        UserError: if there is nothing to draw, the maps do not belong to the images, the figure is
            too large, or `out` has another extension than .png, .svg and .pdf.
    """
    import numpy as np
    from matplotlib.figure import Figure

    images = np.asarray(images)
    check_figure_file(out)
    _check_columns(columns, images)
    tile_height, tile_width = tile_size(*images.shape[1:3])
    margin, header, column_gap, row_gap = 12, 46, 17, 8
    if any(column.predictions for column in columns):
        row_gap = 28  # room for a line of text
    right = margin + tile_width
    spans = []
    for column in columns:
        left = right + column_gap
        stages = max(1, len(column.maps))  # a network without maps leaves the space of one
        right = left + stages * (tile_width + STAGE_GAP) - STAGE_GAP
        spans.append((left, right))
    width, height = right + margin, header + len(images) * (tile_height + row_gap) + margin
    if max(width, height) >= 2**16:  # the limit of matplotlib's renderer
        raise UserError(
            f"a figure of {width} x {height} pixels is too large: give fewer images or networks"
        )
    form = Path(out).suffix.lower().removeprefix(".") or "png"  # a pipe has no extension
    # SVG and PDF count in points, 72 an inch, and place images by them.
    dpi = DPI if form == "png" else 72
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)

    def write(text: str, x: int, y: int, room: int, size: float = 7, **style: Any) -> None:
        """Writes text, cut to `room`, at x and y from the top left, all in pixels."""
        text = truncate(text, int(room / (0.82 * size)))  # the mean width of a letter
        # A class may be called `$5`, which is no formula.
        style |= {"fontsize": size * DPI / dpi, "color": INK, "parse_math": False}
        figure.text(x / width, 1 - y / height, text, **style)

    write("image", margin, 36, tile_width)
    for column, (left, right) in zip(columns, spans, strict=True):
        write(column.title, left, 19, right - left, size=9, fontweight="bold")
        for i, stage in enumerate(column.maps):
            write(stage, left + i * (tile_width + STAGE_GAP), 36, tile_width)
    for k, image in enumerate(images):
        tile, top = make_tile(image), header + k * (tile_height + row_gap)
        bottom = height - top - tile_height  # figimage counts from the bottom of the figure
        figure.figimage(tile, margin, bottom, origin="upper")
        for column, (left, right) in zip(columns, spans, strict=True):
            if column.maps:
                pixels = strip(tile, [maps[k] for maps in column.maps.values()], 255)
                figure.figimage(pixels, left, bottom, origin="upper")
            if column.predictions is not None:
                write(str(column.predictions[k]), left, top + tile_height + 13, right - left)
    with replacing(Path(out)) as partial:
        figure.savefig(partial, format=form, dpi=dpi)


def check_figure_file(out: Path) -> None:
    """Raises `UserError` unless `out` ends as a figure does."""
    if Path(out).suffix.lower() not in FIGURES and not is_special(Path(out)):
        raise UserError(f"--out {out} is no figure: expected a file ending in {', '.join(FIGURES)}")


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
