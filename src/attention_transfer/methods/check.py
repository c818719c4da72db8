"""Checks that methods fit together, and fit the teacher and the example of a `Transfer`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..errors import UserError, shown
from ..map_options import MapOptions
from .base import Method


def maps_to_read(methods: Sequence[Method], teacher: object = None) -> MapOptions | None:
    """The options of the maps that the methods read from a store."""
    options = list(dict.fromkeys(m.map_options for m in methods if m.map_options is not None))
    if len(options) > 1 and not isinstance(teacher, nn.Module):
        raise UserError(
            "the methods read different maps from a store: give them the same kind, p and axis"
        )
    return options[0] if options else None


def check_methods(methods: Sequence[Method], teacher: object, example: Tensor | None) -> None:
    """Raises `UserError` if the methods, the teacher and the example do not fit together."""
    if not isinstance(methods, (Sequence, nn.ModuleList)):
        raise UserError(
            f"methods is {shown(methods)}: expected a list, such as [ActivationTransfer()]"
        )
    for method in methods:
        if not isinstance(method, Method):
            raise UserError(
                f"methods has {shown(method)}: expected objects, like ActivationTransfer()"
            )
    names = [m.name for m in methods]
    if len(set(names)) < len(names):
        raise UserError(f"methods {names} has a method twice: expected each at most once")
    under_store = teacher is not None and not isinstance(teacher, nn.Module)
    if under_store and not hasattr(teacher, "read"):
        raise UserError(
            f"teacher is an object of type {type(teacher).__name__}: "
            "expected a module, a TeacherStore or None"
        )
    if teacher is not None and not any(method.needs_teacher for method in methods):
        raise UserError(
            f"a teacher is given, but methods {names} use none: pass teacher=None, or a method "
            "that learns from it, such as ActivationTransfer()"
        )
    _check_same_reading([method for method in methods if method.needs_features])
    for method in methods:
        name = type(method).__name__
        if under_store and method.needs_live_teacher is not None:
            raise UserError(
                f"{name} cannot learn from a store: {method.needs_live_teacher}; "
                "pass the teacher itself"
            )
        if method.needs_teacher and teacher is None:
            raise UserError(f"{name} needs a teacher, and teacher is None")
        if method.needs_example and example is None:
            raise UserError(f"{name} needs example=, a batch of images (N, C, H, W), for its sizes")


def _check_same_reading(readers: Sequence[Method]) -> None:
    """Raises `UserError` if one method reads attention and another features of the same layers."""
    for method in readers[1:]:
        if method.reads_attention != readers[0].reads_attention:
            raise UserError(
                f"of {readers[0].name} and {method.name}, one reads attention and the other "
                "features of the same layers: choose one of them, or another kind (--kind, "
                "--teacher-kind)"
            )
