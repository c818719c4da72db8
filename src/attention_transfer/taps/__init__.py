"""Read the layers of any module, list the stages of a network, pair the stages of two.

A stage is the outermost module that produces the last feature map before the resolution drops. The
BN-ReLU of a pre-activation belongs to the next stage. Outputs of 1×1 do not count.
"""

from .capture import Tap, call_uncompiled, evaluating, split_preprocessing, tap, unwrap
from .pairs import (
    explain,
    match_stages,
    pair_stages,
    parse_pairs,
    resolve_pairs,
    unpaired_stages,
)
from .stages import Stage, normalises_positions, stages, try_stages
from .trace import depth_share
