"""Renders images and attention maps: tiles, colours, overlays, and pictures inside a page."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

TILE = 96  # pixels, the approximate longer side of an image in a figure
SMALLEST_MAP = 48  # pixels, longer side; smaller maps are enlarged, or browsers would blur them
LARGEST_IMAGE = 224  # pixels, the longer side of an image in a page
MAP_COLOURS, DIFFERENCE_COLOURS = "inferno", "RdBu_r"


def tile_size(height: int, width: int, tile: int = TILE) -> tuple[int, int]:
    """The (height, width) in pixels at which an image of this size is shown."""
    scale = tile / max(height, width)
    if scale >= 1:
        scale = round(scale)  # a whole number enlarges all pixels equally
    return max(1, round(height * scale)), max(1, round(width * scale))


def make_tile(image: np.ndarray, tile: int = TILE) -> np.ndarray:
    """An image (H, W, 3) uint8 at its tile's size; enlarged pixels keep sharp edges."""
    import numpy as np
    from PIL import Image

    height, width = tile_size(image.shape[0], image.shape[1], tile)
    method = Image.Resampling.LANCZOS
    if height >= image.shape[0]:
        method = Image.Resampling.NEAREST
    picture = Image.fromarray(np.ascontiguousarray(image, dtype=np.uint8))
    return np.asarray(picture.resize((width, height), method))


def finite_map(attention: np.ndarray) -> np.ndarray:
    """A map (h, w) in float32; values that are not finite count as zero."""
    import numpy as np

    return np.nan_to_num(np.asarray(attention, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def resize_map(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map (h, w) at another size, by bicubic interpolation, within the range of its values."""
    import numpy as np
    from PIL import Image

    if values.shape == (height, width):
        return values
    smooth = Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)
    # Bicubic interpolation overshoots next to a sharp edge.
    return np.asarray(smooth).clip(values.min(), values.max())


def pooled_map(attention: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map (h, w) at a smaller size, by average pooling, divided by its l2 norm."""
    import numpy as np
    from PIL import Image

    values = finite_map(attention)
    if values.shape != (height, width):
        small = Image.fromarray(values).resize((width, height), Image.Resampling.BOX)
        values = np.asarray(small)
    return values / max(float(np.linalg.norm(values)), 1e-12)


def map_colours(attention: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map (h, w) as colours (height, width, 3) uint8: black is 0, bright is the map's maximum."""
    return _coloured(_heat(attention, height, width), MAP_COLOURS)


def difference_colours(difference: np.ndarray, limit: float, height: int, width: int) -> np.ndarray:
    """Signed values (h, w) as colours (height, width, 3) uint8: blue is −limit, red limit."""
    import numpy as np

    values = resize_map(finite_map(difference), height, width)
    if limit <= 0:
        return _coloured(np.full_like(values, 0.5), DIFFERENCE_COLOURS)
    return _coloured(0.5 + 0.5 * (values / limit).clip(-1, 1), DIFFERENCE_COLOURS)


def overlay(image: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """A map (h, w) in its colours over the dimmed grey image (H, W, 3) uint8.

    The map is scaled by its own maximum.
    """
    import numpy as np

    heat = _heat(attention, *image.shape[:2])
    grey = (image @ np.array([0.299, 0.587, 0.114]) / 255)[..., None]  # luma of ITU-R BT.601
    colour = _coloured(heat, MAP_COLOURS) / 255
    # The image stays visible where attention is strongest, and its outline where there is none.
    opacity = (0.45 + 0.4 * heat)[..., None]
    blended = (1 - opacity) * grey * 0.8 + opacity * colour
    return (255 * blended).clip(0, 255).astype(np.uint8)


def _heat(attention: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map at this size, divided by its own maximum; a map of zeros stays zero."""
    heat = finite_map(attention)
    if heat.max() > 0:
        heat = heat / heat.max()
    return resize_map(heat, height, width).clip(0, 1)


def _coloured(values: np.ndarray, colours: str) -> np.ndarray:
    """Values in [0, 1] in matplotlib's colour map of that name, as uint8."""
    from matplotlib import colormaps

    return colormaps[colours](values, bytes=True)[..., :3]


def share_in_box(
    attention: np.ndarray, box: np.ndarray, image_shape: tuple[int, ...]
) -> float | None:
    """The share in [0, 1] of a map's sum inside the box; None if the box is unknown.

    A pixel of the map counts by the part of its area inside the box.
    """
    import numpy as np

    x0, y0, x1, y1 = (float(side) for side in box)
    values = finite_map(attention)
    total = float(values.sum())
    if x1 <= x0 or y1 <= y0:
        return None
    if total <= 0:
        return 0.0
    inside = []
    for low, high, size, count in (
        (y0, y1, image_shape[0], values.shape[0]),
        (x0, x1, image_shape[1], values.shape[1]),
    ):
        edges = np.arange(count + 1) * size / count
        lengths = np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)
        inside.append(lengths.clip(0) / np.diff(edges))
    rows, columns = inside
    return float(rows @ values @ columns) / total


def image_address(image: np.ndarray) -> str:
    """An image (H, W, 3) uint8 as a picture inside a page; small images are lossless."""
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((LARGEST_IMAGE, LARGEST_IMAGE), Image.Resampling.LANCZOS)
    if max(image.shape[:2]) <= TILE:
        return _address(picture, lossless=True)
    return _address(picture, quality=85)


def map_size(attention: np.ndarray) -> tuple[int, int]:
    """The (height, width) of a map in a page; a small one is enlarged."""
    height, width = attention.shape
    scale = max(1.0, SMALLEST_MAP / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def heat_address(colours: np.ndarray) -> str:
    """The colours (H, W, 3) uint8 of a smooth map as a picture inside a page."""
    from PIL import Image

    return _address(Image.fromarray(colours), quality=90)


def _address(picture: Image.Image, **options: float) -> str:
    """A picture as a data URL, in WebP, which takes a third of the size of PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", **options)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
