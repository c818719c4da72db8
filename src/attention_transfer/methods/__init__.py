"""The transfer methods, a file each, and the registry that --method reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .activation import ActivationTransfer as ActivationTransfer
    from .base import Method as Method
    from .base import StepInputs as StepInputs
    from .base import TrainingFraction as TrainingFraction
    from .distillation import KnowledgeDistillation as KnowledgeDistillation
    from .distillation import kd_loss as kd_loss
    from .full import FullActivationTransfer as FullActivationTransfer
    from .full import full_activation_loss as full_activation_loss
    from .gradient import GradientTransfer as GradientTransfer
    from .gradient import gradient_loss as gradient_loss
    from .min_l2 import GradientNorm as GradientNorm
    from .min_l2 import gradient_norm_loss as gradient_norm_loss
    from .options import DECAYS as DECAYS
    from .registry import METHODS as METHODS
    from .registry import create_methods as create_methods
    from .registry import method_arguments as method_arguments
    from .registry import method_names as method_names
    from .symmetry import GradientSymmetry as GradientSymmetry
    from .symmetry import symmetry_loss as symmetry_loss

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "activation": ["ActivationTransfer"],
        "base": ["Method", "StepInputs", "TrainingFraction"],
        "distillation": ["KnowledgeDistillation", "kd_loss"],
        "full": ["FullActivationTransfer", "full_activation_loss"],
        "gradient": ["GradientTransfer", "gradient_loss"],
        "min_l2": ["GradientNorm", "gradient_norm_loss"],
        "options": ["DECAYS"],
        "registry": ["METHODS", "create_methods", "method_arguments", "method_names"],
        "symmetry": ["GradientSymmetry", "symmetry_loss"],
    },
)
