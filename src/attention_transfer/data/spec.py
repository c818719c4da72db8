"""Parses the path and the columns of a data spec, with hints for a path that does not exist."""

from __future__ import annotations

import os
from collections import Counter
from difflib import get_close_matches
from pathlib import Path

from ..errors import UserError, nearest
from .options import COLUMNS

# Names of a validation split. `test` is last, because its labels are often not published.
VAL_NAMES = ("validation", "val", "valid", "test")


def existing_folder(spec: str, place: str, expected: str) -> Path:
    """The folder that `place` names; the error for a missing one mentions `expected`."""
    path = expanded(spec, place)
    if os.path.isdir(path):  # `Path.is_dir` raises for a path that is too long
        return path
    state = "is not a folder"
    try:
        path.stat()
    except FileNotFoundError:
        state = "does not exist"
    except (OSError, ValueError) as error:  # too long, a loop of links, a null byte
        state = f"cannot be opened ({getattr(error, 'strerror', None) or error})"
    raise UserError(
        f"data {spec!r}: {path} {state}; expected {expected}; check the path{nearest_path(path)}"
    )


def expanded(spec: str, place: str) -> Path:
    """The path at `place`, with ~ replaced by the user's home."""
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"data {spec!r}: the home directory in {place} is unknown; write the path in full"
        ) from error


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """Sorted files below `folder` that match `pattern`, without hidden files and folders.

    macOS writes hidden files such as ._cat.jpg beside cat.jpg, with the same extension.
    """
    return sorted(
        file
        for file in folder.glob(pattern)
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    )


def nearest_path(path: Path) -> str:
    """`"; did you mean pets/train?"` for the sibling that a missing path resembles, or ""."""
    if os.path.exists(path):
        return ""
    missing = path
    while not os.path.exists(missing.parent) and missing.parent != missing.parent.parent:
        missing = missing.parent
    try:
        siblings = [entry.name for entry in missing.parent.iterdir()]
    except OSError:  # a file, or a folder without permission to read
        return ""
    matches = get_close_matches(missing.name, siblings, n=1)
    if not matches:
        return ""
    return f"; did you mean {missing.parent / matches[0] / path.relative_to(missing)}?"


def split_columns(spec: str, place: str) -> tuple[str, dict[str, str]]:
    """`PATH#image=COLUMN,label=COLUMN` -> (PATH, {"image": COLUMN, …}).

    A path that exists may contain a #.
    """
    path, mark, words = place.rpartition("#")
    if not mark or os.path.exists(expanded(spec, place)):
        return place, {}
    columns = {}
    for word in words.split(","):
        key, _, column = word.partition("=")
        if key not in COLUMNS or not column:
            raise UserError(
                f"data {spec!r}: {word!r} after # names no column: "
                f"expected image=COLUMN or label=COLUMN{nearest(key, COLUMNS)}"
            )
        columns[key] = column
    return path, columns


def unique_names(names: list[str], origins: list[str]) -> tuple[str, ...]:
    """Class names; where classes share one, each gets its origin: crane (n02012849).

    Bytes that are not UTF-8, which folder names may contain, become question marks.
    """
    names, origins = [_readable(name) for name in names], [_readable(name) for name in origins]
    count = Counter(names)
    unique = []
    for name, origin in zip(names, origins, strict=True):
        if count[name] > 1:
            name = f"{name} ({origin})"
        unique.append(name)
    return tuple(unique)


def _readable(name: str) -> str:
    return name.encode(errors="replace").decode()
