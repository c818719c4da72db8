"""The place in a spec: what follows `folder:`, `parquet:` and the like, and words for one that is not there."""

from __future__ import annotations

from collections import Counter
from difflib import get_close_matches
from pathlib import Path

from ..errors import UserError, nearest

COLUMNS = ("image", "label")


def nearest_path(path: Path) -> str:
    """`"; did you mean pets/train?"` for the neighbour that a missing path resembles, or an empty string."""
    if path.exists():
        return ""
    missing = path
    while not missing.parent.exists() and missing.parent != missing.parent.parent:
        missing = missing.parent
    try:
        names = [entry.name for entry in missing.parent.iterdir()]
    except OSError:  # a file, or a folder of somebody else's
        return ""
    close = get_close_matches(missing.name, names, n=1)
    return (
        f"; did you mean {missing.parent / close[0] / path.relative_to(missing)}?" if close else ""
    )


def split_columns(spec: str, place: str) -> tuple[str, dict[str, str]]:
    """`PATH#image=COLUMN,label=COLUMN` -> (PATH, {"image": COLUMN, …}); a path that exists has none.

    Raises `UserError` for other words after the #.
    """
    where, mark, words = place.rpartition("#")
    if not mark or Path(place).expanduser().exists():
        return place, {}
    columns = {}
    for word in words.split(","):
        key, equals, column = word.partition("=")
        if key not in COLUMNS or not equals or not column:
            hint = nearest(key, COLUMNS)
            raise UserError(
                f"data {spec!r}: {word!r} after # names no column: expected image=COLUMN or label=COLUMN{hint}"
            )
        columns[key] = column
    return where, columns


def distinct(names: list[str], origins: list[str]) -> tuple[str, ...]:
    """The names of classes, those that several share told apart by where each is from: crane (n02012849)."""
    count = Counter(names)
    return tuple(
        f"{name} ({origin})" if count[name] > 1 else name
        for name, origin in zip(names, origins, strict=True)
    )
