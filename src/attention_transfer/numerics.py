"""Precision, powers and the cross-entropy, as maps, losses and methods share them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or float64 if it is: in float16 |A|^p overflows and EPS is 0."""
    if x.dtype == torch.float64:
        return x
    return x.float()


def power(a: Tensor, p: float) -> Tensor:
    """|a|^p, whose derivative at 0 is 0 (for p > 1), and the second too where 1 < p < 2."""
    if p == 1:
        return a.abs()
    if p == 2:
        return a.square()
    if p % 2 == 0:
        return power(a.square(), p / 2)
    if p >= 2:
        return a.abs().pow(p)
    # The second derivative of |a|^p is infinite at 0: take 0 out of what autograd sees.
    zero = a == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, a).abs().pow(p))


def cross_entropy(logits: Tensor, y: Tensor, **options: Any) -> Tensor:
    """`F.cross_entropy` in at least float32; y (N,) of class numbers or (N, K) of probabilities."""
    logits = at_least_float32(logits)
    if y.is_floating_point():
        y = y.to(logits.dtype)
    return F.cross_entropy(logits, y, **options)
