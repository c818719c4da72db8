"""Encoded images by number, read from their files when they are needed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .decode import Encoded, decode_into, default_size, fit_boxes
from .images import ImageSet

HEADERS = 1000


class Reader:
    """The images of a data set in their files, by number; picklable, for worker processes.

    `boxes` (N, 4) int64 refer to the upright images; 0 0 0 0 where a box is not known.
    """

    boxes: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def encoded(self, i: int) -> Encoded:
        """The bytes of image `i`, or its file."""
        raise NotImplementedError

    def file(self, i: int) -> str:
        """Name of image `i` within its data set."""
        raise NotImplementedError

    def location(self, i: int) -> str:
        """Location of image `i`, for error messages."""
        raise NotImplementedError

    def default_size(self) -> int:
        """Image size in pixels if none is given, from the headers of some of the images."""
        every = max(1, len(self) // HEADERS)
        return default_size(ReaderSubset(self, range(0, len(self), every)))


class ReaderSubset(Sequence[Encoded]):
    """The images of a reader at some rows, each read on access."""

    def __init__(self, reader: Reader, rows: Sequence[int]) -> None:
        self.reader, self.rows = reader, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, k: int) -> Encoded: ...
    @overload
    def __getitem__(self, k: slice) -> ReaderSubset: ...
    def __getitem__(self, k: int | slice) -> Encoded | ReaderSubset:
        if isinstance(k, slice):
            return ReaderSubset(self.reader, self.rows[k])
        return self.reader.encoded(self.rows[k])


class PackedStrings(Sequence[str]):
    """Many strings in one array.

    Reading a list changes the reference counts of its strings, so that each forked worker would
    copy it page by page.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        # File names may hold bytes that are not UTF-8.
        pieces = [os.fsencode(string) for string in strings]
        self._ends = np.cumsum([0, *(len(piece) for piece in pieces)])
        self._bytes = np.frombuffer(b"".join(pieces), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:  # type: ignore[override]
        if not 0 <= i < len(self):
            raise IndexError(i)
        return os.fsdecode(self._bytes[self._ends[i] : self._ends[i + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


class FileReader(Reader):
    """Image files below `root`."""

    def __init__(
        self, root: Path, files: Sequence[Path], boxes: NDArray[np.int64] | None = None
    ) -> None:
        self.root, self.boxes = root, boxes
        self._files = PackedStrings([file.relative_to(root).as_posix() for file in files])

    def __len__(self) -> int:
        return len(self._files)

    def encoded(self, i: int) -> Encoded:
        return self.root / self._files[i]

    def file(self, i: int) -> str:
        return self._files[i]

    def location(self, i: int) -> str:
        return str(self.root / self._files[i])


def decode_rows(
    reader: Reader,
    rows: Tensor,
    labels: Tensor,
    classes: tuple[str, ...],
    size: int,
    on_bad_image: str,
    short_side: int | None = None,
) -> tuple[ImageSet, NDArray[np.int64]]:
    """Decodes the images at `rows` (M,).

    Each is resized to `short_side` pixels on its shorter side (default: `size`) and center-cropped
    to `size` x `size`. Also returns the upright widths and heights (M, 2), 0 0 for a bad image.
    """
    numbers = rows.tolist()
    out = np.zeros((len(numbers), size, size, 3), dtype=np.uint8)
    encoded = ReaderSubset(reader, numbers)
    sizes = decode_into(
        out, encoded, lambda k: reader.location(numbers[k]), on_bad_image, short_side
    )
    boxes = None
    if reader.boxes is not None:
        upright = reader.boxes[numbers].reshape(-1, 4)
        boxes = torch.from_numpy(fit_boxes(upright, sizes, size, short_side))
    files = tuple(reader.file(i) for i in numbers)
    return ImageSet(torch.from_numpy(out), labels, classes, boxes, files), sizes


def drop_bad(images: ImageSet, sizes: NDArray[np.int64]) -> tuple[ImageSet, int]:
    """The images whose decoded `sizes` (N, 2) are not 0, and the number of the others."""
    good = torch.from_numpy(np.flatnonzero(sizes[:, 0]))
    skipped = len(images) - len(good)
    if skipped:
        images = images.subset(good)
    return images, skipped
