"""The flags of `train` and `distill`: where and how often to run, and the recipe's options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from ..config import recipe_names
from ..data.options import AugmentOptions, DataOptions
from ..methods.options import MethodOptions
from ..models.options import NetworkOptions
from ..options import Int, OptionSpec, option, option_specs, own_options
from ..outputs import Force, JsonFile
from ..runtime.options import RuntimeOptions
from ..store.options import StoreOptions
from ..train.options import LabelOptions, LogOptions, OptimizerOptions, TrainingOptions


@dataclass(frozen=True)
class LaunchOptions:
    """Where the runs are written, and how many there are."""

    out: Annotated[Path, option("Run folder to write, or to continue.")]
    recipe: Annotated[
        str | None,
        option(f"A recipe of the package: {', '.join(recipe_names())}.", default_text="none"),
    ] = None
    config: Annotated[
        Path | None,
        option("A recipe file (YAML); flags override it.", default_text="none"),
    ] = None
    seeds: Annotated[
        Int, option("Number of seeds, each in a folder seed-S of --out.", ge=1, le=10_000)
    ] = 1
    jobs: Annotated[
        Int,
        option(
            "Number of seeds to train at the same time, each with its share of the cores.",
            ge=1,
        ),
    ] = 1
    json: JsonFile = None
    force: Force = False


def train_groups() -> dict[str, list[OptionSpec]]:
    """The options of `train` by the titles of their groups in the help."""
    network = option_specs(NetworkOptions)
    return {
        "what to train": [
            network["model"],
            network["student_weights"],
            network["trust_code"],
            *option_specs(LaunchOptions).values(),
        ],
        "data": [*option_specs(DataOptions).values()],
        "optimiser and schedule": [
            *option_specs(TrainingOptions).values(),
            *option_specs(OptimizerOptions).values(),
        ],
        "augmentation": [
            *option_specs(AugmentOptions).values(),
            *option_specs(LabelOptions).values(),
        ],
        "this machine": [*option_specs(RuntimeOptions).values()],
        "logging": [*option_specs(LogOptions).values()],
    }


def distill_groups() -> dict[str, list[OptionSpec]]:
    """The options of `distill` by the titles of their groups in the help."""
    network = option_specs(NetworkOptions)
    methods = option_specs(MethodOptions)
    # Method, β, decay and pairs come first, because users set them most often.
    first = {spec.key: spec for spec in own_options(MethodOptions)}
    groups = train_groups()
    return {
        "what to train": [
            replace(network["model"], flags=("--student", "--model")),
            network["teacher"],
            network["teacher_weights"],
            *groups["what to train"][1:],
        ],
        "method": [*(first | methods).values()],
        "teach once, with --views": [*option_specs(StoreOptions).values()],
    } | {title: specs for title, specs in groups.items() if title != "what to train"}
