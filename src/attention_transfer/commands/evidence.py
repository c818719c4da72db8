"""The commands that measure: `bench`, `reproduce` and `study`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .. import bench as benches
from ..config import Recipe
from ..console import make_console
from ..options import OptionSpec, from_mapping, option_specs
from ..outputs import check_json
from ..studies.options import PASSED_ON, ReproduceOptions, StudyOptions
from .shared import Command


def bench(arguments: dict[str, Any]) -> None:
    """Measure speed, relative to the authors' training step."""
    keys = option_specs(benches.BenchCommandOptions).keys() & arguments.keys()
    given = {key: arguments.pop(key) for key in keys}
    options = from_mapping(benches.BenchCommandOptions, given)
    check_json(options.json, options.force)
    benches.run_bench(options.name, arguments, make_console(), options.json)


def reproduce(arguments: dict[str, Any]) -> None:
    """Run the experiments of a table of the paper, and print the results beside the paper's."""
    changes = {key: arguments.pop(key) for key in PASSED_ON if key in arguments}
    options = from_mapping(ReproduceOptions, arguments)
    check_json(options.json, options.force, [Path(options.table)], options.out)
    from ..studies.reproduce import reproduce

    reproduce(options, changes, make_console())


def study(arguments: dict[str, Any]) -> None:
    """Study a question of the paper's reviewers: runs, a table with intervals, and a plot."""
    changes = {key: arguments.pop(key) for key in PASSED_ON if key in arguments}
    options = from_mapping(StudyOptions, arguments)
    check_json(options.json, options.force, out=options.out)
    from ..studies.study import run_study

    run_study(options, arguments, changes, make_console())


def _bench_groups() -> dict[str, list[OptionSpec]]:
    specs = option_specs(benches.BenchCommandOptions) | option_specs(benches.BenchOptions)
    return {"options": [*specs.values()]}


def _groups_of_many_runs(options: type, default_text: str) -> dict[str, list[OptionSpec]]:
    """The options of the command, and those of the recipe that apply to every run."""
    recipe = option_specs(Recipe)
    set_by_tables = [key for key in PASSED_ON if key != "trust_code"]
    passed_on = [replace(recipe[key], default_text=default_text) for key in set_by_tables]
    return {
        "options": [*option_specs(options).values()],
        "options of every run": [*passed_on, recipe["trust_code"]],
    }


EVIDENCE = {
    "reproduce": Command(
        reproduce, grouped_options=partial(_groups_of_many_runs, ReproduceOptions, "the table's")
    ),
    "study": Command(
        study, grouped_options=partial(_groups_of_many_runs, StudyOptions, "the study's")
    ),
    "bench": Command(bench, grouped_options=_bench_groups),
}
