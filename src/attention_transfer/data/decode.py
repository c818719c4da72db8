"""From encoded images of any mode and size to one uint8 RGB tensor, in threads."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError

if TYPE_CHECKING:
    from PIL import Image

ON_BAD_IMAGE = ("error", "skip")
MEMORY_SHARE = 0.6
_CHUNK = 32

Encoded = Path | bytes | None


def decode_into(
    out: NDArray[np.uint8],
    encoded: Sequence[Encoded],
    name: Callable[[int], str],
    on_bad_image: str,
    shorter: int | None = None,
) -> NDArray[np.int64]:
    """Decodes into `out` (N, size, size, 3); returns each image's upright width and height (N, 2), 0 0 for a bad one.

    The shorter side is brought to `shorter` pixels (to `size` where it is None), then the centre is cut out.
    `name(i)` says where image i is. Raises `UserError` for the first bad image unless `on_bad_image` is "skip".
    """
    sizes = np.zeros((len(encoded), 2), dtype=np.int64)

    def work(start: int) -> None:
        for i in range(start, min(start + _CHUNK, len(encoded))):
            try:
                sizes[i] = decode_centre(out[i], encoded[i], shorter)
            except MemoryError:
                raise
            except Exception as error:
                # Pillow's decoders raise nearly anything on damaged input (OSError, SyntaxError, zlib.error, ...).
                if on_bad_image != "skip":
                    raise UserError(unreadable(name(i), error)) from error

    # Pillow decodes and resizes outside of the interpreter's lock.
    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        for _ in pool.map(work, range(0, len(encoded), _CHUNK)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return sizes


def unreadable(place: str, error: Exception) -> str:
    """What is said of a bad image: one line."""
    from PIL import UnidentifiedImageError

    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, UnidentifiedImageError):  # which names an object in memory
        reason = "no image format is known by its first bytes"
    return (
        f"cannot read the image {place} ({reason}): expected a whole image; "
        "replace or delete it, or leave such out with --on-bad-image skip"
    )


def decode_centre(
    out: NDArray[np.uint8], encoded: Encoded, shorter: int | None = None
) -> tuple[int, int]:
    """One image into `out` (size, size, 3), resized and its centre cut; its upright width and height."""
    from PIL import Image

    with open_image(encoded) as image:
        picture = turned(to_rgb(image), image)
    width, height = picture.size
    new_width, new_height, left, top = fit(width, height, len(out), shorter)
    if picture.size != (new_width, new_height):
        picture = picture.resize((new_width, new_height), Image.Resampling.BILINEAR)
    out[:] = np.asarray(picture)[top : top + len(out), left : left + len(out)]
    return width, height


def open_image(encoded: Encoded) -> Image.Image:
    """The image with its header read, its pixels not yet."""
    from PIL import Image

    if encoded is None:
        raise ValueError("it has no bytes")
    return Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as 8-bit RGB; 16-bit grey is scaled, not cut off; transparency is dropped."""
    from PIL import Image

    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I"):
        # Grey of 16 bits: Pillow's own conversion clips at 255. 65535 / 257 = 255.
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        # Straight to RGB Pillow warns about transparency given as bytes.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def turned(picture: Image.Image, image: Image.Image) -> Image.Image:
    """Turns the picture as its file's EXIF orientation says."""
    from PIL import Image

    turn = Image.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    method = turns.get(orientation(image))
    return picture if method is None else picture.transpose(method)


def orientation(image: Image.Image) -> Any:
    """The number of EXIF's orientation, 1 where nothing is to be turned."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return image.getexif().get(0x0112, 1)
    except (OSError, ValueError, SyntaxError, TypeError, KeyError, struct.error):
        # A damaged EXIF block leaves the pixels as good as they were.
        return 1


def fit(
    width: int, height: int, size: int, shorter: int | None = None
) -> tuple[int, int, int, int]:
    """New width and height with the shorter side at `shorter` (or `size`), and the left and top of the centre crop."""
    short, side = min(width, height), shorter or size
    new_width, new_height = max(side, width * side // short), max(side, height * side // short)
    return new_width, new_height, (new_width - size) // 2, (new_height - size) // 2


def fit_boxes(
    boxes: NDArray[np.int64], sizes: NDArray[np.int64], size: int, shorter: int | None = None
) -> NDArray[np.int64]:
    """Boxes (N, 4) of images with width and height `sizes` (N, 2) after `fit`; 0 0 0 0 where nothing is left of one."""
    fitted = np.zeros_like(boxes)
    for i, ((x0, y0, x1, y1), (width, height)) in enumerate(
        zip(boxes.tolist(), sizes.tolist(), strict=True)
    ):
        if x1 <= x0 or y1 <= y0 or not width:
            continue
        new_width, new_height, left, top = fit(width, height, size, shorter)
        # Outwards to whole pixels, in whole numbers so that nothing is lost to rounding.
        new = (
            max(x0 * new_width // width - left, 0),
            max(y0 * new_height // height - top, 0),
            min(-(-x1 * new_width // width) - left, size),
            min(-(-y1 * new_height // height) - top, size),
        )
        if new[2] > new[0] and new[3] > new[1]:
            fitted[i] = new
    return fitted


def default_size(encoded: Sequence[Encoded]) -> int:
    """The side to use where none is given: that of square images of one size, else 64 or 224 by the median short side.

    Looks at the headers of at most 1,000 images, evenly over `encoded`.
    """
    from PIL import Image

    found = []
    chosen = encoded[:: max(1, len(encoded) // 1000)]
    for i in range(len(chosen)):
        try:
            if (source := chosen[i]) is None:
                continue
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                found.append(image.size)
        except (OSError, ValueError, Image.DecompressionBombError):
            # Decoding will name it.
            continue
    if len(set(found)) == 1 and found[0][0] == found[0][1]:
        return int(found[0][0])
    return 64 if not found or np.median([min(size) for size in found]) <= 96 else 224


def check_memory(where: str, count: int, size: int) -> None:
    """Raises `UserError` where `count` decoded images of `size` x `size` do not fit the memory that is free."""
    needed, free = count * size * size * 3, available_memory()
    if free is not None and needed > MEMORY_SHARE * free:
        raise UserError(
            f"{where}: {count} images of {size}x{size} take {needed / 2**30:.2f} GiB decoded, expected at most "
            f"{MEMORY_SHARE:.0%} of the {free / 2**30:.2f} GiB of free memory; "
            "lower image_size, limit_train or limit_val, or stream them (--stream on)"
        )


def memory_share() -> int | None:
    """Bytes that decoded images may take, or None where the system does not say."""
    free = available_memory()
    return None if free is None else int(MEMORY_SHARE * free)


def available_memory() -> int | None:
    """Bytes of memory that this process may still take, or None where the system does not say."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        # In a container the limit of the control group is what counts.
        group = Path("/sys/fs/cgroup")
        found.append(
            int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        )
    if not found and hasattr(os, "sysconf"):
        with contextlib.suppress(OSError, ValueError):
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found) if found else None
