"""Read the layers of any module, list the stages of a network, pair the stages of two.

A stage is the outermost module that produces the last feature map before the resolution drops; a pre-activation's
BN-ReLU belongs to the next stage; outputs of 1×1 do not count.
"""

from .capture import Tap, evaluating, hooked_call, tap, unwrap
from .pairs import describe, explain, match_stages, pair_stages, unpaired
from .stages import Stage, find_stages, stages

__all__ = [
    "Stage",
    "Tap",
    "describe",
    "evaluating",
    "explain",
    "find_stages",
    "hooked_call",
    "match_stages",
    "pair_stages",
    "stages",
    "tap",
    "unpaired",
    "unwrap",
]
