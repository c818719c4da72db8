"""Readers give encoded images by number and read them from their files when needed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .decode import Encoded, open_image


class Reader:
    """The images of a data set in their files, by number; picklable, for worker processes.

    `boxes` (N, 4) int64 refer to the upright images; 0 0 0 0 if a box is not known.
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

    def fingerprint_parts(self) -> Iterator[bytes]:
        """Names, sizes and offsets that identify the files without reading images."""
        raise NotImplementedError

    def default_size(self) -> int:
        """Image size in pixels if none is given, from the headers of about 1,000 images.

        It is the images' own size if they are square and of one size, else 64 or 224.
        """
        sizes = []
        for i in range(0, len(self), max(1, len(self) // 1000)):
            # Errors for damaged images are raised later, when they are decoded.
            with contextlib.suppress(Exception), open_image(self.encoded(i)) as image:
                sizes.append(image.size)
        if len(set(sizes)) == 1 and sizes[0][0] == sizes[0][1]:
            return int(sizes[0][0])
        if not sizes or np.median([min(size) for size in sizes]) <= 96:
            return 64
        return 224


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


def file_size(path: Path) -> bytes:
    """Size of a file in bytes, in 8 bytes; -1 if there is none."""
    try:
        size = path.stat().st_size
    except OSError:
        size = -1
    return size.to_bytes(8, signed=True)


class FileReader(Reader):
    """Image files below `root`."""

    def __init__(self, root: Path, files: Sequence[Path]) -> None:
        self.root = root
        self._files = PackedStrings([file.relative_to(root).as_posix() for file in files])

    def __len__(self) -> int:
        return len(self._files)

    def encoded(self, i: int) -> Encoded:
        return self.root / self._files[i]

    def file(self, i: int) -> str:
        return self._files[i]

    def location(self, i: int) -> str:
        return str(self.root / self._files[i])

    def fingerprint_parts(self) -> Iterator[bytes]:
        for name in self._files:
            yield os.fsencode(name)
            yield file_size(self.root / name)
