"""Networks by name, and their weights."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "create_model": ".create",
    "Network": ".network",
    "Preprocess": ".network",
    "load_network": ".network",
    "load_student": ".network",
    "save_student": ".network",
    "load_weights": ".weights",
}
__all__ = list(_HOME)

if TYPE_CHECKING:
    from .create import create_model
    from .network import Network, Preprocess, load_network, load_student, save_student
    from .weights import load_weights


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)
