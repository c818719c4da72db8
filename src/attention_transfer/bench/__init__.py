"""Measures speed relative to the authors' step in the same run: `attention-transfer bench NAME`.

Each bench is a module of this package with one function, `run(options, console, json_file)`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, check_choice
from ..options import from_mapping
from .options import DEFAULTS, NAMES, UNREAD, BenchCommandOptions, BenchOptions

if TYPE_CHECKING:
    from rich.console import Console


def run_bench(
    name: str, given: Mapping[str, Any], console: Console, json_file: Path | None
) -> None:
    """Measures, prints the table, and writes it to `json_file`, if given.

    Args:
        name: one of `NAMES`.
        given: the options that the user gave, by the keys of `BenchOptions`; None means not given.

    Raises:
        UserError: for an unknown name and for wrong options.
    """
    options = bench_options(name, given)
    importlib.import_module(f".{name}", __name__).run(options, console, json_file)


def bench_options(name: str, given: Mapping[str, Any]) -> BenchOptions:
    """The checked options of a bench: what the user gave over the defaults of this bench."""
    check_choice("bench", name, NAMES)
    given = {key: value for key, value in given.items() if value is not None}
    for key in given:
        if name in UNREAD.get(key, ()):
            flag = key.replace("_", "-")
            readers = ", ".join(bench for bench in NAMES if bench not in UNREAD[key])
            raise UserError(
                f"--{flag} is given, but bench {name} does not read it: leave it out "
                f"(benches that read it: {readers})"
            )
    options = from_mapping(BenchOptions, DEFAULTS.get(name, {}) | given)
    if name in ("epoch", "data", "compile") and options.images < options.batch_size:
        raise UserError(
            f"--images is {options.images}: expected at least one batch of {options.batch_size}"
        )
    if name != "gradient":
        for role, network in (("student", options.student), ("teacher", options.teacher)):
            if not network.startswith("wrn-"):
                raise UserError(
                    f"--{role} is {network!r}: the authors' step supports wrn-DEPTH-WIDTH only"
                )
    return options
