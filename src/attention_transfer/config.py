"""A recipe: every option of a run as one plain object, read from YAML and from the command line's words.

The same keys everywhere: `--batch-size` on the command line, `batch_size` in YAML and here.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from .errors import UserError, check_choice, nearest

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("step", "one-cycle", "cosine", "constant")
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16")
COMPILES = ("auto", "on", "off", "graphs")
STREAMS = ("auto", "on", "off")
LOGGERS = ("csv", "tensorboard", "wandb")
# How a run is carried out, not what it computes: another value continues the same run. (What precision `auto` settled
# on is kept with the run; another one asked for by name is refused there.)
RUNTIME = (
    "device",
    "precision",
    "compile",
    "second_order",
    "stream",
    "workers",
    "on_bad_image",
    "log",
)
# One value for every method that has such an option, or one for each by name; None leaves it to the method.
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


@dataclass
class Recipe:
    """The options of `train` and `distill`. See the command's --help for what each means."""

    command: str = "train"
    model: str = ""
    teacher: str | None = None
    method: str = "none"
    data: str = "digits"
    teacher_weights: str | None = None
    student_weights: str | None = None

    beta: float | dict[str, float] | None = None
    decay: str | dict[str, str] | None = None
    kind: str = "sum"
    p: float = 2.0
    norm: float = 2.0
    convention: str = "authors"
    resize: str = "map"
    axis: str = "space"
    weights: tuple[float, ...] | None = None
    squared: bool = True
    pairs: str = "auto"
    alpha: float = 0.9
    temperature: float = 4.0

    epochs: int = 15
    batch_size: int = 128
    lr: float = 0.2
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: str = "one-cycle"
    milestones: tuple[int, ...] = (60, 120, 160)
    lr_decay: float = 0.2
    optimizer: str = "sgd"
    accumulate: int = 1
    lr_reference_batch: int | None = None
    warmup_epochs: float = 0.0
    clip_norm: float | None = None
    weight_decay_on_norm: bool = True
    head_lr: float | None = None
    layer_decay: float | None = None
    freeze_bn: bool = False
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float | None = None
    augment: str = "crop"
    crop_padding: int = 4
    crop_scale: tuple[float, ...] = (0.08, 1.0)
    crop_ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    flip: bool = True
    seed: int = 0
    image_size: int | None = None
    max_steps: int | None = None
    limit_train: int | None = None
    limit_val: int | None = None
    val_split: float | None = None
    on_bad_image: str = "error"
    stream: str = "auto"
    workers: int | None = None

    device: str = "auto"
    precision: str = "auto"
    compile: str = "auto"
    second_order: str = "auto"
    devices: int = 1
    nodes: int = 1
    log: str | None = None

    def identity(self) -> dict[str, Any]:
        """The options that change numbers: two runs with the same are the same run."""
        return {k: v for k, v in self.to_dict().items() if k not in RUNTIME}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, in order, as they stand in config.yaml."""
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()
        }

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


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Recipe)}
KEYS = tuple(_DEFAULTS)
# What is annotated, without its None; lists and what a method each may have are looked at by themselves.
_TYPES: dict[str, type] = {
    key: next(kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None))
    for key, hint in typing.get_type_hints(Recipe).items()
}
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
_AT_LEAST_ONE = (
    *(
        "epochs",
        "batch_size",
        "image_size",
        "max_steps",
        "limit_train",
        "limit_val",
        "devices",
        "nodes",
    ),
    *("accumulate", "lr_reference_batch"),
)
# Options between 0 and an end of their own: (key, whether it may be 0, the end, whether it may be that).
_RANGES = (
    ("warmup_epochs", True, math.inf, False),
    ("clip_norm", False, math.inf, False),
    ("head_lr", False, math.inf, False),
    ("layer_decay", False, 1, True),
    ("label_smoothing", True, 1, False),
    ("mixup", True, math.inf, False),
    ("cutmix", True, math.inf, False),
    ("ema", False, 1, False),
)


def make_recipe(*layers: Mapping[str, Any]) -> Recipe:
    """A checked recipe from layers of options, the later ones winning; keys with `-` and `_` are the same.

    Raises:
        UserError: for an unknown key or value (the nearest valid one is named).
    """
    values: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            key = str(key).replace("-", "_")
            if key not in KEYS:
                raise UserError(
                    f"unknown option {key!r}{nearest(key, KEYS)} (options: {', '.join(KEYS)})"
                )
            values[key] = value
    recipe = Recipe(**{k: _typed(k, v) for k, v in values.items()})
    _check(recipe)
    return recipe


def read_recipe(file: str | Path) -> dict[str, Any]:
    """The options in a YAML file, or of a named recipe that comes with the package.

    Raises:
        UserError: for a file that is not there or is no mapping; for a name that is no recipe.
    """
    import yaml

    path = Path(file)
    try:
        found = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the recipe {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise UserError(
            f"{file} holds a {type(found).__name__}: expected options as KEY: VALUE lines"
        )
    return found


def logger_names(log: str | None) -> list[str]:
    """The loggers in `csv,tensorboard`.

    Raises:
        UserError: for one that is not known.
    """
    names = [] if log is None else [word.strip() for word in log.split(",")]
    for name in names:
        check_choice("logger", name, LOGGERS)
    return list(dict.fromkeys(names))


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(
        f.name.removesuffix(".yaml")
        for f in resources.files(f"{__package__}.recipes").iterdir()
        if f.name.endswith(".yaml")
    )


def named_recipe(name: str) -> dict[str, Any]:
    """The options of a recipe that comes with the package."""
    check_choice("recipe", name, recipe_names())
    with resources.as_file(resources.files(f"{__package__}.recipes") / f"{name}.yaml") as path:
        return read_recipe(path)


def parse_per_method(text: str, number: bool) -> Any:
    """`"1000"` -> 1000.0; `"at=1000,symmetry=1"` -> {"at": 1000.0, "symmetry": 1.0}; words stay words."""

    def value(word: str) -> Any:
        if not number:
            return word.strip()
        try:
            return float(word)
        except ValueError:
            raise UserError(f"{text!r} is not a number, nor METHOD=NUMBER,…") from None

    if "=" not in text:
        return value(text)
    return {k.strip(): value(v) for k, _, v in (part.partition("=") for part in text.split(","))}


def _typed(key: str, value: Any) -> Any:
    if key == "milestones":
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, int) for v in value):
            raise UserError(f"milestones is {value!r}: expected a list of epochs")
        return tuple(value)
    if key == "weights":
        return None if value is None else _numbers(key, value, "one a pair, like 1,1,0.5")
    if key in ("crop_scale", "crop_ratio"):
        return _numbers(key, value, "LOW,HIGH")
    if key in PER_METHOD:
        return _per_method(value, number=key == "beta")
    kind = _TYPES[key]
    if value is None and _DEFAULTS[key] is None:
        return None
    if key in ("compile", "stream") and isinstance(value, bool):
        return "on" if value else "off"  # as YAML reads these two words
    wrong = isinstance(value, bool) != (kind is bool)
    if kind is float and isinstance(value, str):
        # YAML reads 5e-4 as a word.
        try:
            return float(value)
        except ValueError:
            wrong = True
    if wrong or not isinstance(value, (int, float) if kind is float else kind):
        raise UserError(f"{key} is {value!r}: expected {_WORDS[kind]}")
    return kind(value)


def _numbers(key: str, value: Any, expected: str) -> tuple[float, ...]:
    words = value.split(",") if isinstance(value, str) else value
    try:
        return tuple(float(v) for v in words)
    except (TypeError, ValueError):
        raise UserError(f"{key} is {value!r}: expected numbers, {expected}") from None


def _per_method(value: Any, number: bool) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _per_method(v, number) for k, v in value.items()}
    return parse_per_method(value, number) if isinstance(value, str) else value


def _check(recipe: Recipe) -> None:
    from .methods import create_methods
    from .second_order import SECOND_ORDER_MODES

    check_choice("schedule", recipe.schedule, SCHEDULES)
    check_choice("device", recipe.device, DEVICES)
    check_choice("precision", recipe.precision, PRECISIONS)
    check_choice("compile setting", recipe.compile, COMPILES)
    logger_names(recipe.log)
    _check_data(recipe)
    check_choice("second_order", recipe.second_order, SECOND_ORDER_MODES)
    check_choice("command", recipe.command, ("train", "distill"))
    for key in _AT_LEAST_ONE:
        value = getattr(recipe, key)
        if value is not None and value < 1:
            raise UserError(f"{key} is {value}: expected at least 1")
    for key in ("lr", "weight_decay", "momentum", "lr_decay", "crop_padding"):
        value = getattr(recipe, key)
        if not 0 <= value < math.inf or (key == "lr" and value == 0):
            raise UserError(
                f"{key} is {value}: expected a finite number {'>' if key == 'lr' else '≥'} 0"
            )
    _check_training(recipe)
    if not 0 <= recipe.seed < 1 << 63:
        raise UserError(f"seed is {recipe.seed}: expected 0 to 2^63 - 1")
    if recipe.optimizer == "sgd" and recipe.nesterov and recipe.momentum == 0:
        raise UserError("nesterov needs momentum above 0: raise it, or say --no-nesterov")
    methods = create_methods(recipe.method, recipe.method_options())
    if not isinstance(recipe.layer_pairs(), str) and not any(m.needs_features for m in methods):
        raise UserError(
            f"--pairs is given, but method {recipe.method!r} reads no layers: leave it out"
        )
    if recipe.norm != _DEFAULTS["norm"] and recipe.convention != "paper":
        raise UserError(
            f"--norm is given, but --convention {recipe.convention} has none: add --convention paper"
        )
    if recipe.resize != _DEFAULTS["resize"] and recipe.axis == "channel":
        raise UserError(
            "--resize is given, but maps over channels (--axis channel) have no size: leave it out"
        )
    if recipe.teacher_weights is not None and not any(m.needs_teacher for m in methods):
        raise UserError(
            f"--teacher-weights is given, but method {recipe.method!r} has no teacher: leave it out"
        )
    if recipe.second_order != "auto" and not any(m.needs_gradient for m in methods):
        raise UserError(
            f"--second-order is given, but method {recipe.method!r} has no input gradients: leave it out"
        )
    if any(m.needs_teacher for m in methods) and recipe.teacher is None:
        raise UserError(
            f"method {recipe.method!r} needs --teacher (a run folder, or a model with trained weights)"
        )
    if recipe.command == "train" and (recipe.method != "none" or recipe.teacher is not None):
        raise UserError("train takes one network alone: for a teacher and a method use distill")
    if not recipe.model:
        raise UserError("no network named: give --model (train) or --student (distill)")


def _check_data(recipe: Recipe) -> None:
    """How images are read and augmented."""
    from .data.transforms import AUGMENTS, check_ranges

    check_choice("augment", recipe.augment, AUGMENTS)
    check_choice("stream setting", recipe.stream, STREAMS)
    check_ranges(recipe.crop_scale, recipe.crop_ratio)
    if recipe.workers is not None and recipe.workers < 0:
        raise UserError(
            f"workers is {recipe.workers}: expected 0 (decode between the steps) or more"
        )
    others = {"crop": ("crop_scale", "crop_ratio"), "imagenet": ("crop_padding",)}[recipe.augment]
    for key in others:
        if getattr(recipe, key) != _DEFAULTS[key]:
            raise UserError(
                f"--{key.replace('_', '-')} is given, but --augment {recipe.augment} has none: leave it out"
            )
    if recipe.augment == "imagenet" and recipe.stream == "off":
        raise UserError(
            "--augment imagenet cuts whole images as they are decoded: leave --stream off out"
        )


def _check_training(recipe: Recipe) -> None:
    """How the weights are optimised."""
    check_choice("optimizer", recipe.optimizer, OPTIMIZERS)
    for key, zero, end, closed in _RANGES:
        value = getattr(recipe, key)
        if value is not None and not (
            0 < value < end or (zero and value == 0) or (closed and value == end)
        ):
            below = "" if end == math.inf else f" and {'≤' if closed else '<'} {end}"
            raise UserError(
                f"{key} is {value}: expected a finite number {'≥' if zero else '>'} 0{below}"
            )
    if recipe.accumulate > recipe.batch_size:
        raise UserError(
            f"accumulate is {recipe.accumulate}: expected at most the batch size, {recipe.batch_size}"
        )
    if recipe.warmup_epochs and recipe.schedule == "one-cycle":
        raise UserError(
            "--warmup-epochs is given, but --schedule one-cycle warms up of itself: choose another one"
        )
    if recipe.optimizer == "adamw" and recipe.momentum >= 1:
        raise UserError(f"momentum is {recipe.momentum}: AdamW expects its first β below 1")
