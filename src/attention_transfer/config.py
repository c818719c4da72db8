"""The recipe: every option of a run in one flat object, from YAML files and the command line.

Each package declares its options (`*/options.py`); this file joins them. A key is the same
everywhere: `--batch-size` on the command line, `batch_size` in YAML and in Python.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from .data.options import AugmentOptions, DataOptions, check_augment, data_defaults
from .errors import UserError, check_choice
from .methods.options import TEACHER_METHOD, MethodOptions
from .models.options import NetworkOptions
from .options import AUTO, from_mapping, option, option_specs
from .run_folder import is_run_config, read_yaml_mapping
from .runtime.options import RuntimeOptions
from .store import header as stores
from .store.options import StoreOptions
from .train.options import (
    LabelOptions,
    LogOptions,
    OptimizerOptions,
    TrainingOptions,
    check_training,
    logger_names,
)
from .trust import check_trusted

# With `--views auto`, a run shows each view this many times (results/teach-once.md).
EPOCHS_PER_VIEW = 3


# A dataclass lists the fields of its last base first.
@dataclass(frozen=True)
class Recipe(
    LogOptions,
    RuntimeOptions,
    StoreOptions,
    LabelOptions,
    AugmentOptions,
    OptimizerOptions,
    TrainingOptions,
    DataOptions,
    MethodOptions,
    NetworkOptions,
):
    """The options of `train` and `distill`.

    A recipe is an instance of every group, so each part of a run takes the recipe as its own group.
    """

    command: Annotated[
        Literal["train", "distill"], option("Train alone, or with a teacher's guidance.")
    ] = "train"

    def to_dict(self) -> dict[str, Any]:
        """The plain values of config.yaml, the command first."""
        values = {"command": self.command} | dataclasses.asdict(self)
        del values["trust_code"]  # given by a person, never by a file
        for key, value in values.items():
            if isinstance(value, tuple):
                values[key] = list(value)
        return values

    def identity(self) -> dict[str, Any]:
        """The options that change results: two runs with the same values are the same run."""
        specs = option_specs(Recipe)
        return {key: value for key, value in self.to_dict().items() if specs[key].changes_numbers}


def make_recipe(*layers: Mapping[str, Any]) -> Recipe:
    """A checked recipe from layers of options; a later layer wins.

    `batch-size` and `batch_size` are the same key. Without a method, the recipe gets the default:
    `at+kd` with a teacher, otherwise `none`.

    Raises:
        UserError: for an unknown key or a wrong value (the message names the nearest valid one),
            and for options that exclude each other.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        values |= {str(key).replace("-", "_"): value for key, value in layer.items()}
    if values.get("method") is None:
        # Set here, so that the recipe and config.yaml contain the method in effect.
        values["method"] = "none" if values.get("teacher") is None else TEACHER_METHOD
    _fill_beta(values)
    _fill_views(values)
    recipe = from_mapping(Recipe, values)
    _check(recipe)
    return recipe


def recipe_from_flags(
    command: str, name: str | None, file: Path | None, flags: Mapping[str, Any]
) -> Recipe:
    """Defaults < the defaults of the data < the recipe `name` < the recipe `file` < flags.

    Raises:
        UserError: as `make_recipe`, and for a flag without effect.
    """
    layers = []
    if name is not None:
        layers.append(named_recipe(name))
    if file is not None:
        layers.append(read_recipe(file))
    recipe = layered_recipe(*layers, flags, {"command": command})
    if file is not None and is_run_config(file):
        _check_code_of_run(recipe, file, flags)
    check_flags(recipe, flags)
    return recipe


def _fill_beta(values: dict[str, Any]) -> None:
    """Sets the default β of attention transfer, "auto", if no layer has one.

    The recipes of the paper have `beta: null`, which means the published weight.
    """
    names = {name.strip() for name in str(values["method"]).split("+")}
    if "at" not in names:
        return
    beta = values.get("beta")
    if "beta" not in values:
        # kd has no β, so it needs no name for the value.
        values["beta"] = AUTO if names <= {"at", "kd"} else {"at": AUTO}
    elif isinstance(beta, Mapping) and "at" not in beta:
        values["beta"] = {"at": AUTO} | dict(beta)


def _fill_views(values: dict[str, Any]) -> None:
    """Replaces the views "auto" by those of a store as the teacher, or by a third of the epochs."""
    if values.get("views") != AUTO:
        return
    teacher = values.get("teacher")
    if isinstance(teacher, str) and stores.is_store(teacher):
        values["views"] = stores.store_defaults(teacher)["views"]
        return
    epochs = TrainingOptions().epochs
    if "epochs" in values:
        epochs = from_mapping(TrainingOptions, {"epochs": values["epochs"]}).epochs
    values["views"] = math.ceil(epochs / EPOCHS_PER_VIEW)


def layered_recipe(*layers: Mapping[str, Any]) -> Recipe:
    """`make_recipe`, with the defaults of the data below the layer that names the data.

    A store in the teacher's place has its own images and views: they are defaults below the layer
    that names the store.
    """
    teacher = None
    for layer in layers:
        teacher = layer.get("teacher", teacher)
    if not isinstance(teacher, str):
        teacher = None  # a value of YAML that `make_recipe` refuses
    store_options = stores.store_defaults(teacher)
    default = store_options.pop("data", DataOptions().data)

    def about_data(named: str | None) -> dict[str, Any]:
        data = named or default
        return {"data": data} | data_defaults(data)

    layers = _with_defaults(layers, "data", about_data)
    return make_recipe(*_with_defaults(layers, "teacher", lambda _: store_options))


def _with_defaults(
    layers: tuple[Mapping[str, Any], ...], key: str, defaults: Callable[[Any], Mapping[str, Any]]
) -> tuple[Mapping[str, Any], ...]:
    """The layers, with the defaults for a key inserted below the last layer that has the key."""
    value, below = None, 0
    for index, layer in enumerate(layers):
        if key in layer:
            value, below = layer[key], index
    return (*layers[:below], defaults(value), *layers[below:])


def _check_code_of_run(recipe: Recipe, file: Path, flags: Container[str]) -> None:
    """Raises `UserError` if a run's config.yaml names a network that executes a file.

    A network that is named by a flag is allowed.
    """
    for key, network in (("model", recipe.model), ("teacher", recipe.teacher)):
        if network is not None and key not in flags:
            check_trusted(file, network, recipe.trust_code)


def check_flags(recipe: Recipe, flags: Container[str]) -> None:
    """Raises `UserError` for a flag that has no effect in this recipe.

    In a recipe file such an option is allowed, because it has an effect with another schedule or
    method; a person who types a flag expects an effect.
    """
    from .methods.base import can_learn_from_store
    from .methods.registry import create_methods, idle_options

    idle = idle_options(recipe)
    if recipe.schedule != "step":
        for key in ("milestones", "lr_decay"):
            idle[key] = (
                f"--{key.replace('_', '-')} is given, but --schedule {recipe.schedule} has none: "
                "add --schedule step"
            )
    if recipe.nesterov and recipe.optimizer != "sgd":
        idle["nesterov"] = (
            f"--nesterov is given, but --optimizer {recipe.optimizer} has none: leave it out"
        )
    learns = can_learn_from_store(create_methods(recipe))
    idle |= stores.idle_options(recipe, recipe.teacher, learns)
    for key, advice in idle.items():
        if key in flags:
            raise UserError(advice)


def _check(recipe: Recipe) -> None:
    """Raises `UserError` for options that exclude each other; each package checks its group."""
    from .methods.registry import create_methods

    logger_names(recipe)
    check_augment(recipe, recipe.stream)
    check_training(recipe, recipe, recipe, recipe.views)
    methods = create_methods(recipe)
    needs_teacher = any(method.needs_teacher for method in methods)
    if recipe.command == "train" and (recipe.method != "none" or recipe.teacher is not None):
        raise UserError("train takes one network only: for a teacher and a method use distill")
    if needs_teacher and recipe.teacher is None:
        raise UserError(
            f"method {recipe.method!r} needs --teacher "
            "(a run folder, or a model with trained weights)"
        )
    if recipe.teacher is not None and not needs_teacher:
        raise UserError(
            f"--teacher is given, but method {recipe.method!r} uses none: leave --teacher out, "
            f"or choose a method that learns from it, such as {TEACHER_METHOD}"
        )
    if recipe.teacher_weights is not None and recipe.teacher is None:
        raise UserError("--teacher-weights is given without --teacher: name the teacher's network")
    stores.check_store(recipe, recipe.teacher)
    if not recipe.model:
        raise UserError("no network named: give --model (train) or --student (distill)")


def read_recipe(file: str | Path) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        UserError: for a file that cannot be read, is not YAML or is not a mapping.
    """
    try:
        options = read_yaml_mapping(Path(file))
    except OSError as error:
        raise UserError(f"cannot read the recipe {file}: {error.strerror}") from error
    if {"trust_code", "trust-code"} & options.keys():
        raise UserError(f"{file} has trust_code, which no file may set: give the flag --trust-code")
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
