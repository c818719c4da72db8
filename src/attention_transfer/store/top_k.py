"""The top k logits of a teacher, and one number for all the others.

Of logits z over K classes, the store keeps the k largest and c = log(Σ_rest e^z / (K − k)). Each
other class gets c. At temperature 1 the top k classes then have their exact probabilities, and the
others share the rest evenly. At a temperature T > 1 the rest together gets slightly more
probability than in the original, since the mean of e^(z/T) is at most e^(c/T).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..numerics import at_least_float32


def encode(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values (N, k + 1), of which the last is c; classes (N, k)) of logits (N, K), k < K."""
    logits = at_least_float32(logits)
    values, classes = logits.topk(k, dim=1)
    others = logits.scatter(1, classes, -math.inf)
    rest = others.logsumexp(1, keepdim=True) - math.log(logits.shape[1] - k)
    return torch.cat([values, rest], 1), classes


def decode(values: Tensor, classes: Tensor, count: int) -> Tensor:
    """The logits (N, `count`) from the result of `encode`."""
    rest = values[:, -1:].expand(-1, count)
    return rest.scatter(1, classes, values[:, :-1])
