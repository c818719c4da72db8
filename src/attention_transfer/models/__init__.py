"""Networks by name, and their weights."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "create_model": ".create",
    "Network": ".network",
    "check_network": ".network",
    "fixed_size": ".network",
    "run_once": ".network",
    "Preprocess": ".network",
    "load_network": ".network",
    "load_student": ".network",
    "save_student": ".network",
    "load_trained": ".network",
    "load_weights": ".weights",
    "head_parameters": ".weights",
    "start_network": ".network",
    "AuthorsRun": ".authors",
    "load_authors_run": ".authors",
    "run_fingerprint": ".network",
}
__all__ = list(_HOME)

if TYPE_CHECKING:
    from .authors import AuthorsRun as AuthorsRun
    from .authors import load_authors_run as load_authors_run
    from .create import create_model as create_model
    from .network import Network as Network
    from .network import Preprocess as Preprocess
    from .network import check_network as check_network
    from .network import fixed_size as fixed_size
    from .network import load_network as load_network
    from .network import load_student as load_student
    from .network import load_trained as load_trained
    from .network import run_fingerprint as run_fingerprint
    from .network import run_once as run_once
    from .network import save_student as save_student
    from .network import start_network as start_network
    from .weights import head_parameters as head_parameters
    from .weights import load_weights as load_weights


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)
