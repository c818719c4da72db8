"""The cache of this package: downloads, compiled kernels and stores."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """attention-transfer/`name` in XDG_CACHE_HOME or ~/.cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "attention-transfer" / name
