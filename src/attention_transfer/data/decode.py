"""From encoded images of any mode and size to one uint8 RGB tensor, in threads."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError, first_line

if TYPE_CHECKING:
    from PIL import Image

# Share of the free memory that decoded images may take; the training needs the rest.
MEMORY_SHARE = 0.6
# The EXIF tag and its value for an upright image.
ORIENTATION, UPRIGHT = 0x0112, 1
# Pillow's exceptions for a damaged EXIF block.
DAMAGED_EXIF = (OSError, ValueError, SyntaxError, TypeError, KeyError, struct.error)
MEMORY_FILE, CONTROL_GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_CHUNK = 32  # images for each call of a thread

Encoded = Path | bytes | None


def decode_into(
    out: NDArray[np.uint8],
    read: Callable[[int], Encoded],
    name: Callable[[int], str],
    on_bad_image: str,
    short_side: int | None = None,
    may_skip: bool = True,
) -> NDArray[np.int64]:
    """Decodes into `out` (N, size, size, 3).

    Each image is resized to `short_side` pixels on its shorter side (default: `size`), then
    center-cropped. Returns the widths and heights (N, 2) of the upright images, 0 0 if unreadable.

    Args:
        read, name: functions from the index of an image to its bytes or file, and to its location.
        on_bad_image: "skip", or "error" to raise `UnreadableImageError` for the first bad image.
        may_skip: whether the user could have chosen "skip".
    """
    sizes = np.zeros((len(out), 2), dtype=np.int64)

    def work(start: int) -> None:
        for i in range(start, min(start + _CHUNK, len(out))):
            try:
                sizes[i] = decode_center(out[i], read(i), short_side)
            except MemoryError:
                raise  # a full memory does not mean that the image is bad
            except Exception as error:
                # Pillow raises many kinds of exceptions on damaged input: OSError, SyntaxError, …
                if on_bad_image != "skip":
                    raise UnreadableImageError(
                        unreadable_message(name(i), error, may_skip)
                    ) from error

    # Threads suffice, because Pillow decodes and resizes without the interpreter lock.
    pool = ThreadPoolExecutor(max_workers=available_cores())
    # `orientation` replaces the warning filters of the whole process. Threads that end in another
    # order than they began would leave them replaced.
    with warnings.catch_warnings():
        try:
            for _ in pool.map(work, range(0, len(out), _CHUNK)):
                pass
        finally:
            # After an error, the remaining images are not decoded.
            pool.shutdown(cancel_futures=True)
    return sizes


class UnreadableImageError(UserError):
    """An image cannot be decoded."""


def unreadable_message(location: str, error: Exception, may_skip: bool = True) -> str:
    """Error text for an unreadable image, one line."""
    from PIL import UnidentifiedImageError

    reason = first_line(error)
    if isinstance(error, UnidentifiedImageError):  # its text only has the address of a BytesIO
        reason = "its first bytes are of no known image format"
    advice = "replace or delete it"
    if may_skip:
        advice += ", or leave out unreadable images with --on-bad-image skip"
    return f"cannot read the image {location} ({reason}): expected a whole image; {advice}"


def decode_center(
    out: NDArray[np.uint8], encoded: Encoded, short_side: int | None = None
) -> tuple[int, int]:
    """Decodes, resizes and center-crops one image into `out` (size, size, 3).

    Returns the width and height of the upright image.
    """
    from PIL import Image

    with open_image(encoded) as image:
        rgb = to_rgb(exif_transposed(image))
    width, height = rgb.size
    new_width, new_height, left, top = fit(width, height, len(out), short_side)
    if rgb.size != (new_width, new_height):
        rgb = rgb.resize((new_width, new_height), Image.Resampling.BILINEAR)
    out[:] = np.asarray(rgb)[top : top + len(out), left : left + len(out)]
    return width, height


def open_image(encoded: Encoded) -> Image.Image:
    """Opens an image; only its header is read."""
    from PIL import Image

    if encoded is None:
        raise ValueError("it has no bytes")
    if isinstance(encoded, bytes):
        return Image.open(io.BytesIO(encoded))
    return Image.open(encoded)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode to 8-bit RGB; 16-bit grey is scaled, transparency is dropped."""
    from PIL import Image

    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit grey at 255; it should divide by 65535 / 255 = 257.
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        # In a direct conversion to RGB, Pillow warns about transparency given as bytes.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def exif_transposed(image: Image.Image) -> Image.Image:
    """The image with its pixels loaded and rotated upright by its EXIF orientation."""
    from PIL import ImageOps

    image.load()
    if orientation(image) != UPRIGHT:
        # In place, Pillow rotates the pixels first and then rewrites the EXIF block, which may be
        # damaged.
        with contextlib.suppress(*DAMAGED_EXIF):
            ImageOps.exif_transpose(image, in_place=True)
    return image


def orientation(image: Image.Image) -> Any:
    """EXIF orientation, `UPRIGHT` if there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return image.getexif().get(ORIENTATION, UPRIGHT)
    except DAMAGED_EXIF:
        # The pixels are still good if the EXIF block is damaged.
        return UPRIGHT


def fit(
    width: int, height: int, size: int, short_side: int | None = None
) -> tuple[int, int, int, int]:
    """New width and height, and left and top of the center crop of `size` x `size`.

    The shorter side becomes `short_side` pixels long (default: `size`).
    """
    short, side = min(width, height), short_side or size
    # At least `side`: the division rounds down, and a very thin image would get width 0.
    new_width, new_height = max(side, width * side // short), max(side, height * side // short)
    return new_width, new_height, (new_width - size) // 2, (new_height - size) // 2


def fit_boxes(
    boxes: NDArray[np.int64], sizes: NDArray[np.int64], size: int, short_side: int | None = None
) -> NDArray[np.int64]:
    """Boxes (N, 4) after `fit`, of images with upright width and height `sizes` (N, 2).

    0 0 0 0 means that a box is not known or is outside the crop.
    """
    fitted = np.zeros_like(boxes)
    for i, (box, (width, height)) in enumerate(zip(boxes.tolist(), sizes.tolist(), strict=True)):
        x0, y0, x1, y1 = box
        if x1 <= x0 or y1 <= y0 or not width:
            continue
        new_width, new_height, left, top = fit(width, height, size, short_side)
        # Rounds outwards to whole pixels, in integers so that the result is exact.
        new = (
            max(x0 * new_width // width - left, 0),
            max(y0 * new_height // height - top, 0),
            min(-(-x1 * new_width // width) - left, size),
            min(-(-y1 * new_height // height) - top, size),
        )
        if new[2] > new[0] and new[3] > new[1]:
            fitted[i] = new
    return fitted


def check_memory(spec: str, count: int, size: int, streamable: bool) -> None:
    """Raises `UserError` if `count` decoded images of `size` x `size` do not fit into memory."""
    needed, free = count * size * size * 3, available_memory()
    if free is not None and needed > MEMORY_SHARE * free:
        way_out = "lower image_size, limit_train or limit_val"
        if streamable:
            way_out += ", or stream them (--stream on)"
        raise UserError(
            f"{spec}: {count} images of {size}x{size} take {needed / 2**30:.2f} GiB decoded, "
            f"expected at most {MEMORY_SHARE:.0%} of the {free / 2**30:.2f} GiB of free memory; "
            f"{way_out}"
        )


def memory_budget() -> int | None:
    """Bytes that decoded images may take; None if unknown."""
    free = available_memory()
    return None if free is None else int(MEMORY_SHARE * free)


def _cached_bytes(group: Path) -> int:
    """Bytes of a control group that hold cached files; the kernel frees them on demand."""
    lines = map(str.split, (group / "memory.stat").read_text().splitlines())
    return sum(int(value) for key, value in lines if key in ("active_file", "inactive_file"))


def available_memory() -> int | None:
    """Bytes of memory that this process may still take; None if unknown."""
    limits = []
    with contextlib.suppress(OSError, ValueError):
        for line in MEMORY_FILE.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        # The first file describes the whole machine; a container is limited by its control group.
        used = int((CONTROL_GROUP / "memory.current").read_text()) - _cached_bytes(CONTROL_GROUP)
        # Without a limit the file contains the word max, which raises the ValueError.
        limits.append(int((CONTROL_GROUP / "memory.max").read_text()) - used)
    if not limits and hasattr(os, "sysconf"):
        with contextlib.suppress(OSError, ValueError):
            limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)


def available_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
