"""Which network names execute a Python file, and who may allow it; imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import UserError


def executed_file(name: str) -> Path | None:
    """The Python file that FILE.py:FACTORY executes; None for other names."""
    match = re.fullmatch(r"(.+\.py):(\w+)", name)
    return Path(match[1]) if match else None


def check_trusted(source: str | Path, name: str, trust_code: bool) -> None:
    """Raises `UserError` if a network that a run folder names would execute a Python file.

    `source` is the file that names it. Names that the user types are trusted, names in files are
    not.
    """
    file = executed_file(name)
    if file is not None and not trust_code:
        raise UserError(
            f"{source} names the network {name}, which executes the Python file {file}: "
            "if you trust that file, add --trust-code (in Python: trust_code=True)"
        )
