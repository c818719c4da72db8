"""The two kinds of failure a person sees, and the words that point to the nearest right answer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0]


def first_few(names: Sequence[str], count: int = 3) -> str:
    """The first names and, if there are more, "…", for a message."""
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


class UserError(ValueError):
    """The user's words, files or tensors are wrong (the command exits with status 2)."""


class LocalError(UserError):
    """Raised on one rank, such as for an unreadable image of its share, and printed by that rank."""


class RunError(RuntimeError):
    """The run itself failed: a full disk, a loss that is no longer finite (exit status 1)."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """`"; did you mean wrn-16-1?"` for the closest of `valid`, or an empty string."""
    matches = difflib.get_close_matches(str(name), [str(v) for v in valid], n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def check_choice(what: str, value: object, valid: Iterable[str]) -> None:
    """Raises `UserError` unless `value` is one of `valid`; the message lists them and names the nearest."""
    names = [str(v) for v in valid]
    if value not in names:
        raise UserError(
            f"unknown {what} {value!r}: expected one of {', '.join(names)}{nearest(str(value), names)}"
        )
