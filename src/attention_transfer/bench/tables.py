"""`python -m attention_transfer.bench.tables results/bench.md`: the tables of a page, anew from the files it names.

A table belongs to the line `attention-transfer bench … --json FILE` before it. That line (command, date, commit,
rounds, hardware, versions) and the table are written again from FILE; the sentences around them are a person's.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..run_folder import replacing
from .scale import HIDDEN

LINE = re.compile(r"`attention-transfer bench [^`]*--json (?P<file>[^ `]+)[^`]*`")
HEADINGS = {
    "median": "images/s",
    "times_authors": "× authors",
    "times_whole": "× whole",
    "times_floor": "× the floor's time",
    "times_off": "× off",
    "times_peer": "× peer",
    "times_student": "× student's time",
    "logits_error": "logits' error",
    "maps_error": "maps' error",
    "per_core": "a core",
    "peak_mib": "MiB at the height",
}
FORMATS = {
    **dict.fromkeys(("median", "p10", "p90", "per_core", "peak_mib"), ",.0f"),
    **dict.fromkeys(("logits_error", "maps_error"), ".1e"),
    "seconds": ".1f",
    "built": "d",
    "share": ".1%",
}


def rewrite(page: str, root: Path) -> str:
    """The page with every table that follows such a line written again; files are named from `root`.

    Raises:
        UserError: for a file that is not there or no bench's, and a line that no table follows.
    """
    lines = page.split("\n")
    written: list[str] = []
    while lines:
        line = lines.pop(0)
        found = LINE.match(line)
        if found is None:
            written.append(line)
            continue
        measured = _read(root / found["file"])
        written.append(_heading(measured))
        while lines and not lines[0].startswith(("|", "#")):
            written.append(lines.pop(0))
        if not lines or not lines[0].startswith("|"):
            raise UserError(f"no table follows {line!r}: expected one, of any content")
        while lines and lines[0].startswith("|"):
            lines.pop(0)
        written += table(measured["rows"])
    return "\n".join(written)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The rows of a bench as Markdown."""
    keys = [
        key for key in dict.fromkeys(k for row in rows for k in row) if key not in ("name", *HIDDEN)
    ]
    yield "|  | " + " | ".join(HEADINGS.get(key, key.replace("_", " ")) for key in keys) + " |"
    yield "|" + "---|" * (1 + len(keys))
    for row in rows:
        cells = ["" if row.get(key) is None else _cell(key, row[key]) for key in keys]
        yield "| " + " | ".join([row["name"], *cells]) + " |"


def _cell(key: str, value: Any) -> str:
    return value if isinstance(value, str) else format(value, FORMATS.get(key, ".2f"))


def _heading(measured: dict[str, Any]) -> str:
    command = " ".join(["attention-transfer", *measured["command"][1:]])
    rounds, hardware = measured["settings"]["rounds"], measured["hardware"]
    machine = hardware["gpu"] or f"{hardware['cores']} cores of {hardware['cpu']}"
    return (
        f"`{command}` · {measured['date']} · commit {measured['commit']} · {rounds} round{'s' * (rounds != 1)} · "
        f"{machine}, torch {measured['versions']['torch']}"
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    if not isinstance(found, dict) or "rows" not in found or "settings" not in found:
        raise UserError(
            f"{file} holds no bench: expected what `attention-transfer bench NAME --json {file}` writes"
        )
    return found


def main() -> None:
    for page in map(Path, sys.argv[1:]):
        try:
            text = rewrite(page.read_text(), Path())
        except (UserError, OSError) as error:
            print(f"tables: {error}", file=sys.stderr)
            sys.exit(2)
        with replacing(page) as partial:
            partial.write_text(text)


if __name__ == "__main__":
    main()
