"""The two kinds of failure that a user sees, and helpers for their messages."""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

# Parts of the messages of PyTorch's plain RuntimeErrors for a failed allocation.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Storage size calculation overflowed",
)
_SHORT = reprlib.Repr()  # a list of a YAML file may be long, or contain itself many times
_SHORT.maxstring = _SHORT.maxother = 200


class UserError(ValueError):
    """The user's arguments, files or tensors are wrong; the command exits with status 2."""

    def __init__(self, message: object = ""):
        super().__init__(_one_line(message))


class RunError(RuntimeError):
    """The run failed, for example on a full disk or a non-finite loss; the command exits with 1."""

    def __init__(self, message: object = ""):
        super().__init__(_one_line(message))


class RankError(RunError):
    """Another process of the run has died; the remaining processes report it."""


def _one_line(message: object) -> str:
    """The message without line breaks, which file names and values of the user may contain."""
    return str(message).replace("\n", "\\n").replace("\r", "\\r")


@contextmanager
def about(subject: str) -> Iterator[None]:
    """Adds the subject to user errors of the block: `the student: …`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{subject}: {error}") from error


def check_choice(what: str, value: object, valid: Iterable[str]) -> None:
    """Raises `UserError` unless `value` is valid; the message names the nearest valid one."""
    names = [str(v) for v in valid]
    if not isinstance(value, str) or value not in names:
        expected = f"{', '.join(names)}{nearest(str(value), names)}"
        raise UserError(f"unknown {what} {shown(value)}: expected one of {expected}")


def shown(value: object) -> str:
    """A value as one short line, for messages."""
    return " ".join(_SHORT.repr(value).split())


def nearest(name: str, valid: Iterable[str]) -> str:
    """`"; did you mean wrn-16-1?"` for the closest of `valid`, or an empty string."""
    # Below 0.5 the suggestions are not similar enough.
    matches = difflib.get_close_matches(str(name), [str(v) for v in valid], n=2, cutoff=0.5)
    if not matches:
        return ""
    return f"; did you mean {' or '.join(matches)}?"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, in Python or on any device."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def plural(number: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    if number == 1:
        return f"{number} {noun}"
    return f"{number} {noun}s"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if the message is empty."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0]


def describe_unknown(error: Exception) -> str:
    """One line on an error that is not ours. ATTENTION_TRANSFER_TRACEBACK=1 raises it instead."""
    if os.environ.get("ATTENTION_TRANSFER_TRACEBACK"):
        raise error
    return (
        f"{type(error).__name__}: {first_line(error)[:1000]} "
        "(ATTENTION_TRANSFER_TRACEBACK=1 shows where)"
    )


def first_few(names: Sequence[str], count: int = 3) -> str:
    """The first names and, if there are more, "…"."""
    few = ", ".join(names[:count])
    if len(names) > count:
        few += ", …"
    return few
