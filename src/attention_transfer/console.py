"""Consoles that print a user's text as it is."""

from __future__ import annotations

import os
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def make_console(file: IO[str] | None = None, width: int | None = None) -> Console:
    """A console without markup and highlighting: [beta] is not a style, :one: is not an emoji.

    Lines are printed with its method `out`, which does not wrap them; tables with `print`.

    Args:
        file: the file to print to; None: standard output.
        width: in columns; None: that of the terminal.
    """
    from rich.console import Console

    # With NO_COLOR, bold text and the live line go too: they need control characters.
    plain = file is not None or os.environ.get("NO_COLOR")
    return Console(
        file=file,
        width=width,
        force_terminal=False if plain else None,
        markup=False,
        emoji=False,
        highlight=False,
    )
