"""Encoded images by number, from data that stays where it is: what decodes them, now or while training, asks here."""

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
    """A data set's images in their files, by number; it goes to worker processes, so it can be pickled.

    `blocks` (N,) int64, where images are cheap to read only together, numbers the block of each, and `window` so many
    blocks may be read by turns; `boxes` (N, 4) int64 are those of the upright images, 0 0 0 0 where one is not known.
    """

    blocks: Tensor | None = None
    window: int = 1
    boxes: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def encoded(self, i: int) -> Encoded:
        """The bytes of image `i`, or its file."""
        raise NotImplementedError

    def file(self, i: int) -> str:
        """What image `i` is called within its data set."""
        raise NotImplementedError

    def place(self, i: int) -> str:
        """Where image `i` is, for a person who wants to mend it."""
        raise NotImplementedError

    def usual_size(self) -> int:
        """The side to use where none is given, by some of the images."""
        return default_size(Chosen(self, range(0, len(self), max(1, len(self) // HEADERS))))


class Chosen(Sequence[Encoded]):
    """The images of a reader at some rows; each is read when it is asked for."""

    def __init__(self, reader: Reader, rows: Sequence[int]) -> None:
        self.reader, self.rows = reader, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, k: int) -> Encoded: ...
    @overload
    def __getitem__(self, k: slice) -> Chosen: ...
    def __getitem__(self, k: int | slice) -> Encoded | Chosen:
        return (
            Chosen(self.reader, self.rows[k])
            if isinstance(k, slice)
            else self.reader.encoded(self.rows[k])
        )


class Packed(Sequence[str]):
    """Many strings as one array: a list of them would be copied, a page at a time, into every worker that reads it."""

    def __init__(self, strings: Sequence[str]) -> None:
        # Names of files may hold bytes that are no UTF-8.
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
        self._files = Packed([file.relative_to(root).as_posix() for file in files])

    def __len__(self) -> int:
        return len(self._files)

    def encoded(self, i: int) -> Encoded:
        return self.root / self._files[i]

    def file(self, i: int) -> str:
        return self._files[i]

    def place(self, i: int) -> str:
        return str(self.root / self._files[i])


def decode_rows(
    reader: Reader,
    rows: Tensor,
    labels: Tensor,
    classes: tuple[str, ...],
    size: int,
    on_bad_image: str,
    shorter: int | None = None,
) -> tuple[ImageSet, NDArray[np.int64]]:
    """The images at `rows` (M,), decoded now, and their upright widths and heights (M, 2), 0 0 for a bad one.

    Each has its shorter side brought to `shorter` (`size` where it is None) and its centre cut to `size` x `size`.
    """
    where = rows.tolist()
    out = np.zeros((len(where), size, size, 3), dtype=np.uint8)
    sizes = decode_into(
        out, Chosen(reader, where), lambda k: reader.place(where[k]), on_bad_image, shorter
    )
    boxes = None
    if reader.boxes is not None:
        boxes = torch.from_numpy(
            fit_boxes(reader.boxes[where].reshape(-1, 4), sizes, size, shorter)
        )
    files = tuple(reader.file(i) for i in where)
    return ImageSet(torch.from_numpy(out), labels, classes, boxes, files), sizes


def without_bad(images: ImageSet, sizes: NDArray[np.int64]) -> tuple[ImageSet, int]:
    """The images whose decoded `sizes` (N, 2) are not 0, and how many the others are."""
    good = torch.from_numpy(np.flatnonzero(sizes[:, 0]))
    skipped = len(images) - len(good)
    return (images.subset(good) if skipped else images), skipped
