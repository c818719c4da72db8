"""One array of a store: a `.npy` file of rows, and a second one that marks the filled rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..run_folder import replacing
from .header import ArrayEntry

Rows = NDArray[np.int64]
Values = NDArray[np.generic]


class StoredArray:
    """Reads rows through a memory map, and writes them with `os.pwrite`.

    If the disk is full, a write through the map ends the process by SIGBUS; `pwrite` raises.
    """

    def __init__(self, folder: Path, entry: ArrayEntry):
        self.folder, self.entry = folder, entry
        self.row_shape = entry.shape[2:]

    def __reduce__(self) -> tuple[type[StoredArray], tuple[Path, ArrayEntry]]:
        # The copy opens the files again: pickling a memory map would copy it into memory.
        return StoredArray, (self.folder, self.entry)

    @staticmethod
    def create(folder: Path, entry: ArrayEntry) -> None:
        """Makes both files at their full size. They are sparse: they take space as they fill."""
        for name, shape, dtype in (
            (entry.filled_file, entry.shape[:2], "uint8"),
            (entry.file, entry.shape, entry.dtype),
        ):
            with replacing(folder / name) as partial:
                np.lib.format.open_memmap(partial, "w+", np.dtype(dtype), shape)

    @cached_property
    def _values(self) -> np.memmap:
        return self._open(self.entry.file, self.entry.shape, self.entry.dtype)

    @cached_property
    def _filled(self) -> np.memmap:
        return self._open(self.entry.filled_file, self.entry.shape[:2], "uint8")

    def _open(self, name: str, shape: tuple[int, ...], dtype: str) -> np.memmap:
        path = self.folder / name
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:  # NumPy raises several kinds for a damaged header
            reason = "it is missing" if not path.exists() else "it is cut short or damaged"
            raise UserError(f"{path}: {reason}; remove the store and fill it again") from error
        if array.shape != shape or array.dtype != np.dtype(dtype):
            raise UserError(
                f"{path} is {array.dtype} {array.shape}: expected {dtype} {shape}; "
                "remove the store and fill it again"
            )
        return array

    def check(self) -> None:
        """Raises `UserError` for a file that is missing, cut short or of another shape."""
        _ = self._values, self._filled

    def filled(self, view: int, rows: Rows) -> NDArray[np.bool_]:
        """Which of the rows are filled."""
        return np.take(self._filled[view], rows).view(np.bool_)

    def take(self, view: int, rows: Rows) -> Values:
        """A copy of the rows (B, ...)."""
        return np.take(self._values[view], rows, axis=0)

    def write(self, view: int, rows: Rows, values: Values) -> None:
        """Writes rows, each once, then marks them: a killed process marks no unfinished row.

        Raises:
            OSError: as `os.pwrite`, for example if the disk is full.
        """
        order = np.argsort(rows)
        rows, values = rows[order], np.ascontiguousarray(values[order], self.entry.dtype)
        # Neighbours are written in one call. −2, because row 0 after −1 would not begin a group.
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1).tolist()
        ends = [*starts[1:], len(rows)]
        marks = np.ones(len(rows), np.uint8)
        for array, source in ((self._values, values), (self._filled, marks)):
            row_bytes = array.dtype.itemsize * int(np.prod(array.shape[2:], dtype=np.int64))
            first = array.offset + view * array.shape[1] * row_bytes
            with _open_to_write(str(array.filename)) as file:
                for start, end in zip(starts, ends, strict=True):
                    _write_all(file, source[start:end], first + int(rows[start]) * row_bytes)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing to the store during the block."""
    import fcntl  # Windows has none: a store can be read there, not filled

    with _open_to_write(folder / ".lock", os.O_CREAT) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
        yield


@contextmanager
def _open_to_write(path: str | Path, flags: int = 0) -> Iterator[int]:
    file = os.open(path, os.O_WRONLY | flags, 0o666)
    try:
        yield file
    finally:
        os.close(file)


def _write_all(file: int, values: Values, offset: int) -> None:
    rest = memoryview(values.tobytes())
    while rest:
        # If the disk is nearly full, `pwrite` may write only some of the bytes.
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written
