"""The command line that the scripts of the laboratory share.

Each script has a function `run(options, console, json_file)`, as the benches of the package have.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from attention_transfer.bench import BenchOptions
from attention_transfer.errors import RunError, UserError
from attention_transfer.options import from_mapping, option_specs


def main(
    doc: str,
    run: Callable[[BenchOptions, Console, Path | None], None],
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Reads the flags and runs the script; a wrong option ends it with status 2.

    Args:
        doc: the script's docstring, which is its help.
        run: measures, prints, and writes the JSON file.
        defaults: where they differ from those of `attention-transfer bench step`.
    """
    defaults = defaults or {}
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="Write the table to this file.")
    for spec in option_specs(BenchOptions).values():
        default = defaults.get(spec.key, spec.default)
        parser.add_argument(*spec.flags, help=f"{spec.help} [{default}]")
    arguments = vars(parser.parse_args())
    json_file = arguments.pop("json")
    given = {key: value for key, value in arguments.items() if value is not None}
    try:
        run(from_mapping(BenchOptions, {**defaults, **given}), Console(), json_file)
    except (UserError, RunError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
