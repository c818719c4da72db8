"""Finds a dead student: its logits or features are the same for every image."""

from __future__ import annotations

from torch import Tensor

from ..maps import normalize_map
from ..taps import evaluating
from ..transfer import Transfer

# Outputs are constant if their range over the images, relative to the largest, is at most this.
CONSTANT = 1e-6


def dead_parts(transfer: Transfer, x: Tensor) -> list[str]:
    """A sentence for each part of the student that is constant over the images x (N, C, H, W).

    The parts are the layers of its pairs and its logits. The student runs once, in eval mode.
    """
    # Equal outputs for equal images are no fault.
    if not (x != x[:1]).any():
        return []
    with evaluating(transfer.student):
        logits, features = transfer._read_student(x)
    parts = []
    for (layer, _), feature in zip(transfer.pairs, features, strict=True):
        if not feature.any():
            parts.append(f"layer {layer} outputs zeros")
        elif _is_constant(normalize_map(feature.flatten(1))):
            parts.append(f"layer {layer} outputs the same features for every image")
    if _is_constant(logits.float()):
        parts.append("its logits are the same for every image")
    return list(dict.fromkeys(parts))  # a layer may be in several pairs


def _is_constant(rows: Tensor) -> bool:
    spread = (rows.amax(0) - rows.amin(0)).max()
    return bool(spread <= CONSTANT * rows.abs().max())
