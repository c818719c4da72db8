"""The registry of transfer methods: the names of --method and their classes."""

from __future__ import annotations

from typing import Any

from ..errors import UserError, nearest
from .activation import ActivationTransfer
from .base import Method
from .distillation import KnowledgeDistillation
from .full import FullActivationTransfer
from .gradient import GradientTransfer
from .min_l2 import GradientNorm
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


def method_names(expression: str) -> list[str]:
    """`"at+kd"` -> ["at", "kd"]; `"none"` -> [].

    Raises:
        UserError: for a name that is no method (the nearest is named), or one that is named twice.
    """
    names = [n.strip() for n in expression.split("+")]
    if names == ["none"]:
        return []
    for name in names:
        if name not in METHODS:
            known = ["none", *METHODS, "at+kd"]
            expected = f"{', '.join(known[:-1])} or a sum of them ({known[-1]})"
            raise UserError(f"unknown method {name!r}: expected {expected}{nearest(name, known)}")
    if len(set(names)) < len(names):
        raise UserError(f"method {expression!r} names a term twice")
    return names


def create_methods(
    expression: str, options: dict[str, dict[str, Any]] | None = None
) -> list[Method]:
    """The methods of a --method expression, each with its options ({name: {option: value}})."""
    return [METHODS[name](**(options or {}).get(name, {})) for name in method_names(expression)]
