"""Shared by the commands: the class `Command` and the summaries of runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..options import OptionSpec, option_specs

if TYPE_CHECKING:
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


def run_summaries(folders: Sequence[RunFolder]) -> dict[str, Any]:
    """The summary.json of each finished run, with its folder."""
    runs = []
    for folder in folders:
        summary = folder.summary()
        if summary is not None:
            runs.append({"folder": str(folder), **summary})
    return {"runs": runs}
