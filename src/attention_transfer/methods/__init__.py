"""The transfer methods, one file each, and the registry that --method reads."""

from __future__ import annotations

from typing import Any

from ..errors import UserError, nearest
from .activation import ActivationTransfer
from .base import DECAYS, Method, Progress, StepInputs
from .distillation import KnowledgeDistillation, kd_loss
from .full import FullActivationTransfer, full_activation_loss
from .gradient import GradientTransfer, gradient_loss
from .min_l2 import GradientNorm, gradient_norm_loss
from .symmetry import GradientSymmetry, symmetry_loss

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

__all__ = [
    "DECAYS",
    "METHODS",
    "ActivationTransfer",
    "FullActivationTransfer",
    "GradientNorm",
    "GradientSymmetry",
    "GradientTransfer",
    "KnowledgeDistillation",
    "Method",
    "Progress",
    "StepInputs",
    "create_methods",
    "full_activation_loss",
    "gradient_loss",
    "gradient_norm_loss",
    "kd_loss",
    "method_names",
    "symmetry_loss",
]


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
