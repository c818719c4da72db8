"""Ctrl-C and SIGTERM: a run finishes its step, saves its state and stops; imports no torch."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..run_folder import RunFolder


class Interrupted(KeyboardInterrupt):
    """Raised after Ctrl-C or SIGTERM, once the state is saved."""

    def __init__(self) -> None:
        super().__init__("the state is saved; run the same command again to continue")


def interrupt(number: int, frame: Any) -> None:
    """A handler of SIGTERM: the process ends as with Ctrl-C, with one line and status 130."""
    raise KeyboardInterrupt


@contextmanager
def explain_interrupt(folder: RunFolder) -> Iterator[None]:
    """Adds to an interruption of the block what is saved and how to continue."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt as stop:
        kept = "nothing is saved yet; run the same command again to start anew"
        if folder.has_checkpoint:
            kept = "the last checkpoint is kept; run the same command again to continue"
        raise KeyboardInterrupt(kept) from stop


@contextmanager
def signal_handlers(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    """Sets `handler` for these signals and restores the earlier handlers at the end."""
    try:
        earlier = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:  # Python sets handlers in the main thread only
        earlier = {}
    try:
        yield
    finally:
        for number, before in earlier.items():
            signal.signal(number, before)


class StopRequest:
    """A signal handler that asks the trainer to stop; a second Ctrl-C interrupts at once."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.received = False

    def __call__(self, number: int, frame: Any) -> None:
        if not self.received:
            self.received = True
            self.say("stopping after this step; the state is saved first")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        # A second SIGTERM is ignored: the process group and the parent may each send one.
