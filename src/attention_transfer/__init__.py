"""Attention transfer: train a small network to look where a strong one looks.

Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017. Names are imported when they
are first used, so `import attention_transfer` loads nothing from outside the standard library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import plot as plot
    from .checks.preflight import preflight as preflight
    from .errors import RunError as RunError
    from .errors import UserError as UserError
    from .maps import at_loss as at_loss
    from .maps import attention_map as attention_map
    from .maps import convert_beta as convert_beta
    from .methods.activation import ActivationTransfer as ActivationTransfer
    from .methods.distillation import KnowledgeDistillation as KnowledgeDistillation
    from .methods.distillation import kd_loss as kd_loss
    from .methods.full import FullActivationTransfer as FullActivationTransfer
    from .methods.full import full_activation_loss as full_activation_loss
    from .methods.gradient import GradientTransfer as GradientTransfer
    from .methods.gradient import gradient_loss as gradient_loss
    from .methods.min_l2 import GradientNorm as GradientNorm
    from .methods.min_l2 import gradient_norm_loss as gradient_norm_loss
    from .methods.symmetry import GradientSymmetry as GradientSymmetry
    from .methods.symmetry import symmetry_loss as symmetry_loss
    from .models.authors import load_authors_run as load_authors_run
    from .models.create import create_model as create_model
    from .models.network import load_student as load_student
    from .second_order import input_gradient as input_gradient
    from .store.create import create_store as create_store
    from .store.store import TeacherStore as TeacherStore
    from .taps import Stage as Stage
    from .taps import pair_stages as pair_stages
    from .taps import stages as stages
    from .taps import tap as tap
    from .transfer import Transfer as Transfer

_MODULES = {
    "checks.preflight": ["preflight"],
    "errors": ["RunError", "UserError"],
    "maps": ["at_loss", "attention_map", "convert_beta"],
    "methods.activation": ["ActivationTransfer"],
    "methods.distillation": ["KnowledgeDistillation", "kd_loss"],
    "methods.full": ["FullActivationTransfer", "full_activation_loss"],
    "methods.gradient": ["GradientTransfer", "gradient_loss"],
    "methods.min_l2": ["GradientNorm", "gradient_norm_loss"],
    "methods.symmetry": ["GradientSymmetry", "symmetry_loss"],
    "models.authors": ["load_authors_run"],
    "models.create": ["create_model"],
    "models.network": ["load_student"],
    "second_order": ["input_gradient"],
    "store.create": ["create_store"],
    "store.store": ["TeacherStore"],
    "taps": ["Stage", "pair_stages", "stages", "tap"],
    "transfer": ["Transfer"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = ["__version__", "plot", *_HOME]


def __getattr__(name: str) -> Any:
    if name == "plot":
        return importlib.import_module(".plot", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "plot"})
