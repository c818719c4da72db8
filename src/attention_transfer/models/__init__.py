"""Networks by name, and their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .authors import AuthorsRun as AuthorsRun
    from .authors import load_authors_run as load_authors_run
    from .create import create_model as create_model
    from .network import Network as Network
    from .network import Preprocess as Preprocess
    from .network import fixed_size as fixed_size
    from .network import load_student as load_student
    from .network import load_trained as load_trained
    from .network import run_fingerprint as run_fingerprint
    from .network import save_student as save_student
    from .start import check_network as check_network
    from .start import load_network as load_network
    from .start import run_once as run_once
    from .start import start_network as start_network
    from .weights import head_parameters as head_parameters
    from .weights import load_weights as load_weights

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "authors": ["AuthorsRun", "load_authors_run"],
        "create": ["create_model"],
        "network": [
            *["Network", "Preprocess", "fixed_size", "save_student"],
            *["load_student", "load_trained", "run_fingerprint"],
        ],
        "start": ["check_network", "load_network", "run_once", "start_network"],
        "weights": ["head_parameters", "load_weights"],
    },
)
