"""A setting: the options of a run that change its numbers, and their text."""

from __future__ import annotations

import json
import re
from pathlib import PurePath
from typing import Any

from ..config import Recipe
from ..methods.options import ActivationOptions, DistillationOptions, GradientOptions
from ..options import OptionSpec, option_specs
from .formats import MISSING, data_name, model_name, option_value
from .load_run import LoadedRun

SPECS: dict[str, OptionSpec] = option_specs(Recipe)
# Options that may differ between the runs of one row.
PER_RUN_OPTIONS = (
    "seed",
    *(key for key, spec in SPECS.items() if not spec.changes_numbers),
)

# The methods that read each option.
READ_BY: dict[str, frozenset[str]] = (
    dict.fromkeys(option_specs(ActivationOptions), frozenset({"at"}))
    | dict.fromkeys(option_specs(DistillationOptions), frozenset({"kd"}))
    | dict.fromkeys(option_specs(GradientOptions), frozenset({"gradient", "symmetry"}))
    | {"pairs": frozenset({"at", "full"})}
)


def setting(run: LoadedRun) -> dict[str, Any]:
    """The options of a run's setting; an option that an old run folder lacks has its default."""
    options = {key: spec.default for key, spec in SPECS.items()}
    options |= {key: value for key, value in run.config.items() if value is not None}
    options |= {"command": run.command, "model": run.model}
    if options.get("teacher"):
        # Each seed may have a teacher with the same seed.
        options["teacher"] = without_seed(str(options["teacher"]))
    return {
        key: value
        for key, value in options.items()
        if value is not None and key not in PER_RUN_OPTIONS
    }


def as_key(value: Any) -> str:
    """Equal text for equal options, which may be lists or dictionaries."""
    return json.dumps(value, sort_keys=True, default=str)


def without_seed(path: str) -> str:
    """`runs/teacher/seed-1` -> `runs/teacher`."""
    if re.fullmatch(r"seed-\d+", PurePath(path).name):
        return str(PurePath(path).parent)
    return path


def applies(name: str, options: dict[str, Any]) -> bool:
    """Whether the method of a setting reads this option."""
    methods = set(str(options.get("method") or "none").split("+"))
    if name == "beta":
        return bool(methods - {"none", "kd"})
    if name in ("decay", "teacher", "teacher_weights"):
        return methods != {"none"}
    if name == "norm" and options.get("convention") != "paper":
        return False
    return name not in READ_BY or bool(READ_BY[name] & methods)


def option_text(name: str, options: dict[str, Any]) -> str:
    """The value of an option in a setting; a dash if its method does not read it."""
    if not applies(name, options):
        return MISSING
    value = options.get(name)
    if value is None:
        spec = SPECS.get(name)
        # The default of β and of its schedule depends on the method.
        if spec is None or name in ("beta", "decay"):
            return "default"
        return spec.default_text or "none"
    if name == "model":
        return model_name(str(value))
    if name == "data":
        return data_name(value)
    return option_value(value)
