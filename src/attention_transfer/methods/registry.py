"""The registry of methods for --method, and their creation from options."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from ..errors import UserError, nearest
from ..options import AUTO
from ..taps.pairs import parse_pairs
from .activation import ActivationTransfer
from .base import Method
from .distillation import KnowledgeDistillation
from .full import FullActivationTransfer
from .gradient import GradientTransfer
from .min_l2 import GradientNorm
from .options import MethodOptions
from .symmetry import GradientSymmetry

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        ActivationTransfer,
        KnowledgeDistillation,
        FullActivationTransfer,
        GradientTransfer,
        GradientSymmetry,
        GradientNorm,
    )
}
# One value, or one for each method: {"at": 1000, "symmetry": 1}; None is the method's default.
PER_METHOD = ("beta", "decay")
PUBLISHED_BETA = 1000.0  # the authors', for ImageNet and CIFAR-10
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(MethodOptions)}
_SHARED = tuple(key for key in _DEFAULTS if key not in (*PER_METHOD, "method", "pairs"))


def method_names(expression: str | None) -> list[str]:
    """`"at+kd"` -> ["at", "kd"]; `"none"` or None -> [].

    Raises:
        UserError: for an unknown method (with the nearest name), or one that is named twice.
    """
    if expression is None or expression.strip() == "none":
        return []
    names = [name.strip() for name in expression.split("+")]
    for name in names:
        if name not in METHODS:
            single, example = ["none", *METHODS], "at+kd"
            raise UserError(
                f"unknown method {name!r}: expected {', '.join(single)} or a sum of them "
                f"({example}){nearest(name, [*single, example])}"
            )
    if len(set(names)) < len(names):
        raise UserError(f"method {expression!r} names a term twice")
    return names


def needs_teacher(expression: str | None) -> bool:
    """Whether a method of the expression learns from a teacher."""
    return any(METHODS[name].needs_teacher for name in method_names(expression))


def create_methods(options: MethodOptions) -> list[Method]:
    """The methods of `options.method`, each with the options that its class takes.

    Raises:
        UserError: for a wrong value, an option that no chosen method has, and options that exclude
            each other.
    """
    arguments = method_arguments(options)
    methods = [METHODS[name](**given) for name, given in arguments.items()]
    reads_layers = any(method.needs_features for method in methods)
    if not isinstance(parse_pairs(options.pairs), str) and not reads_layers:
        raise UserError(_no_layers(options))
    if options.norm != _DEFAULTS["norm"] and options.convention != "paper":
        raise UserError(
            f"--norm is given, but --convention {options.convention} has none: "
            "add --convention paper"
        )
    kinds = {options.kind, options.of_teacher.kind}
    if options.p != _DEFAULTS["p"] and kinds == {"attention"}:
        raise UserError("--p is given, but --kind attention has no power: leave it out")
    if options.resize != _DEFAULTS["resize"] and options.axis == "channel":
        raise UserError(
            "--resize is given, but maps over channels (--axis channel) have no size: leave it out"
        )
    return methods


def idle_options(options: MethodOptions) -> dict[str, str]:
    """{option: message} for the options that the chosen methods do not read."""
    classes = [METHODS[name] for name in method_names(options.method)]
    accepted = {key for cls in classes for key in inspect.signature(cls).parameters}
    idle = {key: _unused(options, key) for key in (*_SHARED, *PER_METHOD) if key not in accepted}
    if not any(cls.needs_features for cls in classes):
        idle["pairs"] = _no_layers(options)
    return idle


def method_arguments(options: MethodOptions) -> dict[str, dict[str, Any]]:
    """{method: {argument: value}} for the methods of `options.method`."""
    parameters = {
        name: inspect.signature(METHODS[name]).parameters for name in method_names(options.method)
    }
    arguments: dict[str, dict[str, Any]] = {name: {} for name in parameters}
    for name, accepted in parameters.items():
        # The defaults of the combination come first, so that given options replace them.
        for other, defaults in METHODS[name].defaults_with.items():
            if other in parameters:
                arguments[name].update(defaults)
        for key in _SHARED:
            if key in accepted:
                arguments[name][key] = getattr(options, key)
    for key in PER_METHOD:
        for name, value in _by_method(options, key, parameters).items():
            if value is not None:  # as in {"at": None}: the method's default
                arguments[name][key] = value
    for key in _SHARED:
        used = any(key in accepted for accepted in parameters.values())
        if not used and getattr(options, key) != _DEFAULTS[key]:
            raise UserError(_unused(options, key))
    return arguments


def _by_method(
    options: MethodOptions, key: str, parameters: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, Any]:
    """{method: value} of --beta or --decay; empty if it is not given."""
    value = getattr(options, key)
    if value is None:
        # None means the published β, for the paper's recipes; config.py gives the others auto.
        return {"at": PUBLISHED_BETA} if key == "beta" and "at" in parameters else {}
    having = [name for name, accepted in parameters.items() if key in accepted]
    if not having:
        raise UserError(_unused(options, key))
    if isinstance(value, Mapping):
        for name in value:
            if name not in having:
                raise UserError(
                    f"--{key} names {name!r}, but method {options.method!r} has "
                    f"{', '.join(having)} with a {key}"
                )
        return value
    if value == AUTO:
        names = [name for name in having if METHODS[name].has_auto_beta]
        if not names:
            raise UserError(
                f"--beta is auto, but method {options.method!r} has no automatic β: give a number"
            )
        return dict.fromkeys(names, value)
    # A schedule without a name is for β, if a method has a β; kd=SCHEDULE sets that of α.
    names = [name for name in having if "beta" in parameters[name]] or having
    if key == "beta" and len(names) > 1:
        example = ",".join(f"{name}=NUMBER" for name in names)
        raise UserError(
            f"--beta {value:g} could mean {' or '.join(names)}, whose scales differ: "
            f"give --beta {example}"
        )
    return dict.fromkeys(names, value)


def _no_layers(options: MethodOptions) -> str:
    return f"--pairs is given, but method {options.method!r} reads no layers: leave it out"


def _unused(options: MethodOptions, key: str) -> str:
    advice = "leave it out"
    if options.method in (None, "none"):
        # Without a teacher the method is none: perhaps --teacher was forgotten.
        advice += ", or give --teacher or --method"
    flag = key.replace("_", "-")
    return f"--{flag} is given, but method {options.method!r} has no {flag}: {advice}"
