"""The commands that train: `train`, `distill`, `teach` and `demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ..config import recipe_from_flags
from ..console import make_console
from ..options import Int, from_mapping, option, option_specs
from ..outputs import Force, JsonFile, check_json, write_numbers
from ..store.options import teach_groups, teach_options
from .launch_options import LaunchOptions, distill_groups, train_groups
from .shared import Command


def train(arguments: dict[str, Any]) -> None:
    """Train one network alone: a teacher, or a baseline."""
    _launch("train", arguments)


def distill(arguments: dict[str, Any]) -> None:
    """Train a student with a teacher; without --teacher, train the student alone."""
    _launch("distill", arguments)


def _launch(command: str, arguments: dict[str, Any]) -> None:
    keys = option_specs(LaunchOptions).keys() & arguments.keys()
    launch = from_mapping(LaunchOptions, {key: arguments.pop(key) for key in keys})
    recipe = recipe_from_flags(command, launch.recipe, launch.config, arguments)
    inputs = [] if launch.config is None else [launch.config]
    check_json(launch.json, launch.force, inputs, launch.out)
    from ..launch import run_seeds
    from ..next_steps import next_steps
    from ..report import check_report
    from ..runtime.ranks import global_rank

    if launch.seeds > 1:
        check_report(launch.out / "report.html", launch.force)
    folders = run_seeds(recipe, launch.out, launch.seeds, make_console(), launch.jobs)
    if global_rank() == 0 and all(folder.finished for folder in folders):
        for line in next_steps(launch.out, folders):
            print(line)
        summaries = [{"folder": str(folder)} | (folder.summary() or {}) for folder in folders]
        write_numbers(launch.json, {"runs": summaries})


def teach(arguments: dict[str, Any]) -> None:
    """Store a teacher's outputs for fixed views of the images; distill --teacher STORE reads them.

    If it was stopped, the same command continues.
    """
    options = teach_options(arguments)
    check_json(options.json, options.force, out=options.out)
    from ..runtime.process import deterministic_algorithms
    from ..train.teach import teach as fill

    with deterministic_algorithms(options.deterministic):
        numbers = fill(options, make_console())
    # Only the first process of all nodes has the numbers.
    if numbers:
        write_numbers(options.json, numbers)


@dataclass(frozen=True)
class DemoOptions:
    """The options of `demo`."""

    out: Annotated[Path, option("Folder to write.")] = Path("runs/demo")
    seeds: Annotated[Int, option("Seeds of each student.", ge=1)] = 3
    json: JsonFile = None
    force: Force = False


def demo(arguments: dict[str, Any]) -> None:
    """Train a teacher and students on built-in data and compare them, in minutes on a CPU."""
    options = from_mapping(DemoOptions, arguments)
    check_json(options.json, options.force, out=options.out)
    from ..demo import run_demo
    from ..report import check_report, comparison_numbers

    check_report(options.out / "report.html", options.force)
    rows = run_demo(options.out, options.seeds, make_console())
    if options.json is not None:
        write_numbers(options.json, comparison_numbers(rows))


TRAINING = {
    "demo": Command(demo, DemoOptions),
    "train": Command(train, grouped_options=train_groups),
    "distill": Command(distill, grouped_options=distill_groups),
    "teach": Command(teach, grouped_options=teach_groups),
}
