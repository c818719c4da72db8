"""Rewrites the tables of result pages from the JSON files that the pages name.

    python bench/tables.py results/bench.md results/gradient.md

A line `attention-transfer bench … --json FILE`, or `python bench/… --json FILE`, precedes each
table. The script rewrites this line (command, date, commit, rounds, hardware, versions) and the
table from FILE, and keeps the sentences around them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attention_transfer.errors import UserError
from attention_transfer.run_folder import replacing

COMMANDS = "(attention-transfer bench |python bench/)"
LINE = re.compile(rf"`{COMMANDS}[^`]*--json (?P<file>[^ `]+)[^`]*`")
HIDDEN = ("name", "axis", "value", "authors_rate", "student_rate", "teacher_rate")
HEADINGS = {
    "median": "images/s",
    "times_authors": "× authors",
    "times_whole": "× whole",
    "times_floor": "× the floor's time",
    "times_alone": "× alone",
    "times_live": "× live",
    "times_off": "× off",
    "times_peer": "× peer",
    "times_student": "× student's time",
    "per_core": "a core",
    "peak_mib": "peak MiB",
}
FORMATS = {
    **dict.fromkeys(("median", "p10", "p90", "per_core", "peak_mib", "rounds"), ",.0f"),
    "seconds": ".1f",
    "built": "d",
    "share": ".1%",
}


def rewrite(page: str, root: Path) -> str:
    """The page with rewritten tables; the names of its files are relative to `root`.

    Raises:
        UserError: for a file that does not exist or holds no bench, and a command without a table.
    """
    lines = page.split("\n")
    written: list[str] = []
    while lines:
        line = lines.pop(0)
        match = LINE.match(line)
        if match is None:
            written.append(line)
            continue
        result = read_result(root / match["file"])
        written.append(heading(result))
        while lines and not lines[0].startswith(("|", "#")):
            written.append(lines.pop(0))
        if not lines or not lines[0].startswith("|"):
            raise UserError(f"no table follows {line!r}: expected a table with any content")
        while lines and lines[0].startswith("|"):
            lines.pop(0)
        written += table(result["rows"])
    return "\n".join(written)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The rows of a bench as Markdown."""
    keys = [key for key in dict.fromkeys(k for row in rows for k in row) if key not in HIDDEN]
    headings = [HEADINGS.get(key, key.replace("_", " ")) for key in keys]
    yield "|  | " + " | ".join(headings) + " |"
    yield "|" + "---|" * (1 + len(keys))
    for row in rows:
        cells = [_cell(key, row.get(key)) for key in keys]
        yield "| " + " | ".join([row["name"], *cells]) + " |"


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return format(value, FORMATS.get(key, ".2f"))


def heading(result: dict[str, Any]) -> str:
    program, *arguments = result["command"]
    if program.endswith(".py") and program != "__main__.py":
        program = f"python bench/{program}"
    else:
        program = "attention-transfer"
    rounds, hardware = result["settings"]["rounds"], result["hardware"]
    machine = hardware["gpu"] or f"{hardware['cores']} cores of {hardware['cpu']}"
    plural = "" if rounds == 1 else "s"
    return (
        f"`{' '.join([program, *arguments])}` · {result['date']} · commit {result['commit']} · "
        f"{rounds} round{plural} · {machine}, torch {result['versions']['torch']}"
    )


def read_result(file: Path) -> dict[str, Any]:
    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    if not isinstance(result, dict) or "rows" not in result or "settings" not in result:
        raise UserError(
            f"{file} holds no bench: "
            f"expected what `attention-transfer bench NAME --json {file}` writes"
        )
    return result


def main() -> None:
    for page in map(Path, sys.argv[1:]):
        try:
            text = rewrite(page.read_text(), Path())
        except (UserError, OSError) as error:
            print(f"tables.py: {error}", file=sys.stderr)
            sys.exit(2)
        with replacing(page) as partial:
            partial.write_text(text)


if __name__ == "__main__":
    main()
