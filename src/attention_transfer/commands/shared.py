"""Shared by the commands: the class `Command`, the terminal, and the summaries of runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..options import OptionSpec, option_specs

if TYPE_CHECKING:
    from rich.console import Console

    from ..run_folder import RunFolder


@dataclass(frozen=True)
class Command:
    """A command: `run` takes the arguments that the user gave; its docstring is the help."""

    run: Callable[[dict[str, Any]], None]
    options: type | None = None
    grouped_options: Callable[[], dict[str, list[OptionSpec]]] | None = None

    def groups(self) -> dict[str, list[OptionSpec]]:
        """The options by the titles of their groups in the help."""
        if self.grouped_options is not None:
            return self.grouped_options()
        assert self.options is not None, "a command has options"
        return {"options": list(option_specs(self.options).values())}


def make_console() -> Console:
    from rich.console import Console

    # Otherwise [beta] in a user's text would be a style, and :one: a picture.
    plain: Any = {"markup": False, "emoji": False}
    if os.environ.get("NO_COLOR"):
        # Bold text and the live line also need control characters.
        return Console(force_terminal=False, **plain)
    return Console(**plain)


def run_summaries(folders: Sequence[RunFolder]) -> dict[str, Any]:
    """The summary.json of each finished run, with its folder."""
    runs = []
    for folder in folders:
        summary = folder.summary()
        if summary is not None:
            runs.append({"folder": str(folder), **summary})
    return {"runs": runs}
