"""Silences other libraries, which log and warn about things that a user cannot change."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(level: int = logging.WARNING) -> Iterator[None]:
    """Suppresses warnings, and log records up to `level`, inside the block."""
    disabled = logging.root.manager.disable
    logging.disable(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
