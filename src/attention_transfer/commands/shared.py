"""`Command`: its function, its options and its help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..options import OptionSpec, option_specs


@dataclass(frozen=True)
class Command:
    """A command: `run` takes the arguments that the user gave; its docstring is the help."""

    run: Callable[[dict[str, Any]], None]
    options: type | None = None
    grouped_options: Callable[[], dict[str, list[OptionSpec]]] | None = None

    @property
    def summary(self) -> str:
        """The first line of the help."""
        return str(self.run.__doc__).splitlines()[0]

    def groups(self) -> dict[str, list[OptionSpec]]:
        """The options by the titles of their groups in the help."""
        if self.grouped_options is not None:
            return self.grouped_options()
        assert self.options is not None, "a command has options"
        return {"options": list(option_specs(self.options).values())}
