"""Precision, powers and the cross-entropy, shared by maps, losses and methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import can_be_read, check_same_device
from .errors import UserError

IGNORED_LABEL = -100  # marks a sample without a label; the default of `F.cross_entropy`

# The lower bound of `F.normalize`, by which the authors' code divides its maps.
EPS = 1e-12


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32 (or float64, unchanged): in float16 |A|^p overflows and EPS is 0."""
    if x.dtype == torch.float64:
        return x
    return x.float()


def power(a: Tensor, p: float) -> Tensor:
    """|a|^p. At 0 its derivative is 0 for p > 1, and its second derivative is 0 for 1 < p < 2."""
    if p == 1:
        return a.abs()
    if p == 2:
        return a.square()
    if p % 2 == 0:
        return power(a.square(), p / 2)
    if p >= 2:
        return a.abs().pow(p)
    # The second derivative of |a|^p is infinite at 0, so autograd must not see zeros.
    zero = a == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, a).abs().pow(p))


def cross_entropy(logits: Tensor, y: Tensor, **options: Any) -> Tensor:
    """`F.cross_entropy` in at least float32; y (N,) of class numbers or (N, K) of probabilities.

    Raises:
        UserError: for labels of a wrong type or shape. Class numbers out of range, a batch without
            labels and probabilities below 0 are found only in eager mode on a CPU; elsewhere the
            check would wait for the device.
    """
    _check_labels(y, logits)
    if can_be_read(y):
        _check_label_values(y, logits.shape[1], needs_one=options.get("reduction") != "sum")
    logits = at_least_float32(logits)
    if y.is_floating_point():
        y = y.to(logits.dtype)
    return F.cross_entropy(logits, y, **options)


def check_logits(output: Any, network: str) -> Tensor:
    """The output of a network, such as "the student", if it is logits (N, K)."""
    if not isinstance(output, Tensor):
        description = f"an object of type {type(output).__name__}"
        if isinstance(output, Mapping):
            description += f" with {', '.join(map(str, output))}"
        elif isinstance(output, (tuple, list)):
            description += f" of {len(output)}"
    elif output.ndim != 2 or not output.is_floating_point():
        description = f"{output.dtype} {tuple(output.shape)}"
    else:
        return output
    raise UserError(
        f"{network} returns {description}: expected logits, a tensor (N, K); "
        "wrap it in a module that returns them alone"
    )


def _check_labels(y: Tensor, logits: Tensor) -> None:
    shape, expected = tuple(y.shape), tuple(logits.shape)
    if 0 in expected:
        raise UserError(f"the logits have the empty shape {expected}: expected a batch of images")
    check_same_device(y, "labels", logits, "the logits")
    if y.is_floating_point():
        if shape != expected:
            raise UserError(f"soft labels {shape} for logits {expected}: expected both (N, K)")
        return
    if y.dtype != torch.int64 or shape != expected[:1]:
        raise UserError(
            f"labels {y.dtype} {shape} for logits {expected}: "
            "expected int64 (N,), or (N, K) of probabilities"
        )


def _check_label_values(y: Tensor, classes: int, needs_one: bool) -> None:
    lowest, highest = (value.item() for value in y.aminmax())
    if y.is_floating_point():
        # Comparisons with NaN are false, so NaN raises as well.
        if not 0 <= lowest <= highest < math.inf:
            raise UserError(
                f"soft labels go from {lowest:g} to {highest:g}: expected probabilities"
            )
        return
    if needs_one and highest == IGNORED_LABEL == lowest:
        raise UserError(f"all labels are {IGNORED_LABEL}: expected at least one image with a label")
    if lowest < 0:
        # Only in this rare case is each label checked.
        wrong = y[(y < 0) & (y != IGNORED_LABEL)]
        lowest = int(wrong[0]) if len(wrong) else 0
    if lowest < 0 or highest >= classes:
        label = lowest if lowest < 0 else highest
        text = f"label {label} for logits of {classes} classes"
        raise UserError(f"{text}: expected 0 to {classes - 1}")
