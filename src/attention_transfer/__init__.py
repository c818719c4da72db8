"""Attention transfer: train a small network to look where a strong one looks (Zagoruyko & Komodakis, ICLR 2017)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "attention_map": ".maps",
    "at_loss": ".maps",
    "convert_beta": ".maps",
    "kd_loss": ".methods",
    "full_activation_loss": ".methods",
    "input_gradient": ".second_order",
    "gradient_loss": ".methods",
    "symmetry_loss": ".methods",
    "gradient_norm_loss": ".methods",
    "ActivationTransfer": ".methods",
    "KnowledgeDistillation": ".methods",
    "FullActivationTransfer": ".methods",
    "GradientTransfer": ".methods",
    "GradientSymmetry": ".methods",
    "GradientNorm": ".methods",
    "Stage": ".taps",
    "stages": ".taps",
    "pair_stages": ".taps",
    "tap": ".taps",
    "Transfer": ".transfer",
    "preflight": ".checks.preflight",
    "create_model": ".models",
    "load_student": ".models",
    "load_authors_run": ".models",
    "UserError": ".errors",
    "RunError": ".errors",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from .checks.preflight import preflight as preflight
    from .errors import RunError as RunError
    from .errors import UserError as UserError
    from .maps import at_loss as at_loss
    from .maps import attention_map as attention_map
    from .maps import convert_beta as convert_beta
    from .methods import ActivationTransfer as ActivationTransfer
    from .methods import FullActivationTransfer as FullActivationTransfer
    from .methods import GradientNorm as GradientNorm
    from .methods import GradientSymmetry as GradientSymmetry
    from .methods import GradientTransfer as GradientTransfer
    from .methods import KnowledgeDistillation as KnowledgeDistillation
    from .methods import full_activation_loss as full_activation_loss
    from .methods import gradient_loss as gradient_loss
    from .methods import gradient_norm_loss as gradient_norm_loss
    from .methods import kd_loss as kd_loss
    from .methods import symmetry_loss as symmetry_loss
    from .models import create_model as create_model
    from .models import load_authors_run as load_authors_run
    from .models import load_student as load_student
    from .second_order import input_gradient as input_gradient
    from .taps import Stage as Stage
    from .taps import pair_stages as pair_stages
    from .taps import stages as stages
    from .taps import tap as tap
    from .transfer import Transfer as Transfer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
