"""Attention transfer: train a small network to look where a strong one looks.

Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017. Names are imported when they
are first used, so `import attention_transfer` loads nothing from outside the standard library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import attach

__version__ = "0.1.0"

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
    from .models.authors import load_authors_run as load_authors_run
    from .models.create import create_model as create_model
    from .models.network import load_student as load_student
    from .second_order import input_gradient as input_gradient
    from .taps import Stage as Stage
    from .taps import pair_stages as pair_stages
    from .taps import stages as stages
    from .taps import tap as tap
    from .transfer import Transfer as Transfer

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "checks.preflight": ["preflight"],
        "errors": ["RunError", "UserError"],
        "maps": ["at_loss", "attention_map", "convert_beta"],
        "methods": [
            "ActivationTransfer",
            "FullActivationTransfer",
            "GradientNorm",
            "GradientSymmetry",
            "GradientTransfer",
            "KnowledgeDistillation",
            "full_activation_loss",
            "gradient_loss",
            "gradient_norm_loss",
            "kd_loss",
            "symmetry_loss",
        ],
        "models.authors": ["load_authors_run"],
        "models.create": ["create_model"],
        "models.network": ["load_student"],
        "second_order": ["input_gradient"],
        "taps": ["Stage", "pair_stages", "stages", "tap"],
        "transfer": ["Transfer"],
    },
)
__all__ += ["__version__"]
