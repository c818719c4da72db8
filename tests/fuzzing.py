"""What the fuzzers share: how many examples they draw, and what a command may do with any input."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from attention_transfer import cli

EXAMPLES = int(os.environ.get("ATTENTION_TRANSFER_FUZZ", "0"))  # 0: a few, always the same ones
SECONDS = 10
WALL_SECONDS = 120  # for what waits and does not work; the machine may be busy
STATUSES = (0, 1, 2, 130)


def fuzz(few: int = 25, share: float = 1.0) -> Any:
    """The settings of a fuzzer: the same `few` examples, or as many as ATTENTION_TRANSFER_FUZZ.

    `share` of them, where an example takes long.
    """
    return settings(
        max_examples=max(1, round(EXAMPLES * share)) if EXAMPLES else few,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


class Hang(BaseException):
    """No `except Exception` of a command stops it."""


@contextmanager
def no_hang() -> Iterator[None]:
    """Raises `Hang` in a block that works for 10 seconds, or waits for two minutes."""

    def stop(*_: Any) -> None:
        raise Hang(f"no end after {SECONDS} s")

    timers = {signal.ITIMER_PROF: SECONDS, signal.ITIMER_REAL: WALL_SECONDS}
    handlers = [signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)]
    for timer, seconds in timers.items():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), handlers, strict=True):
            signal.signal(number, handler)


def carry_out(words: list[str]) -> tuple[int, str, str]:
    """Status, standard output and standard error of a command in this process."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2)]
    status = 0
    with no_hang(), redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        try:
            cli.main(words)
        except SystemExit as leaving:
            status = int(leaving.code or 0)
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    return status, texts[0], texts[1]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its content; None for a link, a pipe or a device."""
    found: dict[str, bytes | None] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            plain = path.is_file() and not path.is_symlink()
            found[str(path.relative_to(folder))] = path.read_bytes() if plain else None
    return found


def check_command(words: list[str], names: Callable[[str], bool] = bool) -> int:
    """Carries out a command and checks how it ends; returns its status.

    Args:
        names: whether an error names what is wrong.
    """
    status, out, err = carry_out(words)
    shown = f"{words!r} -> {status}: {err[-600:]}"
    assert status in STATUSES, shown
    assert "Traceback" not in out + err, shown
    # This is how a command ends that met an error of which nothing is known.
    assert "ATTENTION_TRANSFER_TRACEBACK" not in err, shown
    if status in (1, 2):
        lines = [line for line in err.splitlines() if line.startswith("attention-transfer: ")]
        assert len(lines) == 1, shown
        assert names(lines[0]), f"nothing is named: {shown}"
    sys.stdout.flush()
    return status
