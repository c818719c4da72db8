"""The recipe: every option of a run in one flat object, from YAML files and the command line.

Each room declares its options (`*/options.py`); this file joins them. A key is the same everywhere:
`--batch-size` on the command line, `batch_size` in YAML and in Python.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from .data.options import AugmentOptions, DataOptions, check_augment, data_defaults
from .errors import UserError, check_choice
from .methods.options import MethodOptions
from .models.options import NetworkOptions
from .options import from_mapping, option, option_specs
from .runtime.options import RuntimeOptions
from .train.options import (
    LabelOptions,
    LogOptions,
    OptimizerOptions,
    TrainingOptions,
    check_training,
    logger_names,
)

# Keys of older recipes and run folders, with the value that means what is done today.
RETIRED = {"second_order": "auto"}


# A dataclass lists the fields of its last base first.
@dataclass(frozen=True)
class Recipe(
    LogOptions,
    RuntimeOptions,
    LabelOptions,
    AugmentOptions,
    OptimizerOptions,
    TrainingOptions,
    DataOptions,
    MethodOptions,
    NetworkOptions,
):
    """The options of `train` and `distill`.

    A recipe is an instance of every group, so a part of a run is handed the group that it owns.
    """

    command: Annotated[
        Literal["train", "distill"], option("Train alone, or with a teacher's guidance.")
    ] = "train"

    def to_dict(self) -> dict[str, Any]:
        """Plain values as they stand in config.yaml, the command first."""
        values = {"command": self.command} | dataclasses.asdict(self)
        for key, value in values.items():
            if isinstance(value, tuple):
                values[key] = list(value)
        return values

    def identity(self) -> dict[str, Any]:
        """The options that change numbers: two runs that agree in them are the same run."""
        specs = option_specs(Recipe)
        return {key: value for key, value in self.to_dict().items() if specs[key].changes_numbers}

    def method_options(self) -> dict[str, dict[str, Any]]:
        """Options for each method, by its name: those of this recipe that its class takes."""
        from .methods import METHODS, method_names

        takes = {n: inspect.signature(METHODS[n]).parameters for n in method_names(self.method)}
        shared = [key for key in KEYS if key not in PER_METHOD]
        given = {n: {key: getattr(self, key) for key in shared if key in takes[n]} for n in takes}
        for key in PER_METHOD:
            value = getattr(self, key)
            having = [n for n in takes if key in takes[n]]
            if value is not None and not having:
                raise UserError(
                    f"--{key} is given, but method {self.method!r} has no {key}: leave it out"
                )
            # A schedule without a name is that of β; α's is asked for by its method's name.
            plain = [n for n in having if "beta" in takes[n]] or having
            if key == "beta" and len(plain) > 1 and isinstance(value, (int, float)):
                ways = ",".join(f"{n}=NUMBER" for n in plain)
                raise UserError(
                    f"--beta {value:g} could mean {' or '.join(plain)}, whose scales differ: say --beta {ways}"
                )
            for name, number in (
                value.items() if isinstance(value, Mapping) else [(n, value) for n in plain]
            ):
                if name not in having:
                    known = ", ".join(having) or "none"
                    raise UserError(
                        f"--{key} names {name!r}, but method {self.method!r} has {known} with a {key}"
                    )
                if number is not None:
                    given[name][key] = number
        defaults_of = {f.name: f.default for f in dataclasses.fields(self)}
        for key in METHOD_KEYS:
            if not any(key in t for t in takes.values()) and getattr(self, key) != defaults_of[key]:
                raise UserError(
                    f"--{key} is given, but method {self.method!r} has no {key}: leave it out"
                )
        for name in takes:
            for other, defaults in METHODS[name].beside.items():
                if other in takes:
                    given[name] = defaults | given[name]
        return given

    def layer_pairs(self) -> str | list[tuple[str, str]]:
        """`auto`, `last2` and the like, or the pairs in "student=teacher,student=teacher"."""
        if self.pairs == "auto" or re.fullmatch(r"last[1-9]\d*", self.pairs):
            return self.pairs
        pairs = [tuple(p.strip() for p in pair.split("=")) for pair in self.pairs.split(",")]
        if any(len(p) != 2 or not all(p) for p in pairs):
            raise UserError(
                f"--pairs is {self.pairs!r}: expected auto, last2, or STUDENT_LAYER=TEACHER_LAYER,… (see `stages`)"
            )
        return [(s, t) for s, t in pairs]


METHOD_KEYS = (
    "kind",
    "p",
    "norm",
    "convention",
    "resize",
    "axis",
    "weights",
    "squared",
    "alpha",
    "temperature",
)
PER_METHOD = ("beta", "decay")
KEYS = tuple(Recipe().to_dict())


def make_recipe(*layers: Mapping[str, Any]) -> Recipe:
    """A checked recipe from layers of options; a later layer wins.

    `batch-size` and `batch_size` are the same key.

    Raises:
        UserError: for an unknown key or a wrong value (the message names the nearest valid one),
            and for options that do not go together.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        values |= {str(key).replace("-", "_"): value for key, value in layer.items()}
    for key, only in RETIRED.items():
        if values.pop(key, only) != only:
            raise UserError(f"{key} is no longer an option: leave it out")
    recipe = from_mapping(Recipe, values)
    _check(recipe)
    return recipe


def layered_recipe(*layers: Mapping[str, Any]) -> Recipe:
    """`make_recipe`, with the defaults of the data that the layers name below all of them."""
    data = DataOptions().data
    for layer in layers:
        data = layer.get("data", data)
    return make_recipe(data_defaults(data), *layers)


def _check(recipe: Recipe) -> None:
    """Options that do not go together; each room checks its own group."""
    from .methods import create_methods

    logger_names(recipe)
    check_augment(recipe, recipe.stream)
    check_training(recipe, recipe)
    methods = create_methods(recipe.method, recipe.method_options())
    if not isinstance(recipe.layer_pairs(), str) and not any(m.needs_features for m in methods):
        raise UserError(
            f"--pairs is given, but method {recipe.method!r} reads no layers: leave it out"
        )
    if recipe.norm != 2.0 and recipe.convention != "paper":
        raise UserError(
            f"--norm is given, but --convention {recipe.convention} has none: add --convention paper"
        )
    if recipe.resize != "map" and recipe.axis == "channel":
        raise UserError(
            "--resize is given, but maps over channels (--axis channel) have no size: leave it out"
        )
    needs_teacher = any(method.needs_teacher for method in methods)
    if recipe.teacher_weights is not None and not needs_teacher:
        raise UserError(
            f"--teacher-weights is given, but method {recipe.method!r} has no teacher: leave it out"
        )
    if needs_teacher and recipe.teacher is None:
        raise UserError(
            f"method {recipe.method!r} needs --teacher "
            "(a run folder, or a model with trained weights)"
        )
    if recipe.command == "train" and (recipe.method != "none" or recipe.teacher is not None):
        raise UserError("train takes one network alone: for a teacher and a method use distill")
    if not recipe.model:
        raise UserError("no network named: give --model (train) or --student (distill)")


def read_recipe(file: str | Path) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        UserError: for a file that cannot be read, is not YAML or is no mapping.
    """
    import yaml

    try:
        options = yaml.safe_load(Path(file).read_text())
    except OSError as error:
        raise UserError(f"cannot read the recipe {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise UserError(
            f"{file} holds a {type(options).__name__}: expected options as KEY: VALUE lines"
        )
    return options


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    files = resources.files(f"{__package__}.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def named_recipe(name: str) -> dict[str, Any]:
    """The options of a recipe that comes with the package."""
    check_choice("recipe", name, recipe_names())
    with resources.as_file(resources.files(f"{__package__}.recipes") / f"{name}.yaml") as path:
        return read_recipe(path)
