"""How many examples hypothesis makes: a few in the tests, as many as one likes by a variable."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("ATTENTION_TRANSFER_FUZZ", "0"))


def fuzz(few: int = 25) -> Any:
    """The settings of a fuzzer: the same `few` examples, or as many as ATTENTION_TRANSFER_FUZZ."""
    return settings(
        max_examples=EXAMPLES or few,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
