"""Σ |A|^p and its gradient on a GPU, each in one pass over A: what `kernels.cpp` is on a CPU.

A sample is seen as (positions, length): a map value a position, summed over `length`. In memory one of the two is
contiguous, the other's stride is its length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Layout(NamedTuple):
    """How n samples lie in memory; strides in elements."""

    n: int
    positions: int
    length: int
    position_stride: int
    length_stride: int

    @classmethod
    def of(cls, n: int, rows: int, columns: int, inner: bool) -> Layout:
        """Of (n, rows, columns), contiguous, summed over the columns (`inner`) or the rows."""
        return cls(n, rows, columns, columns, 1) if inner else cls(n, columns, rows, 1, columns)


@triton.jit
def _power(a, P: tl.constexpr):
    a = tl.abs(a)
    if P >= 2:
        a = a * a
    if P == 4:
        a = a * a
    return a


@triton.jit
def _slope(a, g, P: tl.constexpr):
    if P == 1:
        return tl.where(a > 0, g, tl.where(a < 0, -g, 0 * g))
    if P == 2:
        return a * (2 * g)
    return a * (a * a) * (4 * g)


@triton.jit
def _sum(
    features, q, positions, length, position_stride, length_stride,
    P: tl.constexpr, POSITIONS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)
    start = features + sample * positions * length + m[:, None] * position_stride
    total = tl.zeros([POSITIONS, LENGTH], tl.float32)
    for first in range(0, length, LENGTH):
        k = first + tl.arange(0, LENGTH)
        inside = (m[:, None] < positions) & (k[None, :] < length)
        a = tl.load(start + k[None, :] * length_stride, inside, 0.0).to(tl.float32)
        total += _power(a, P)
    tl.store(q + sample * positions + m, tl.sum(total, 1), m < positions)


@triton.jit
def _gradient(
    features, g, out, positions, length, position_stride, length_stride,
    P: tl.constexpr, POSITIONS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)
    first = sample * positions * length + m[:, None] * position_stride
    each = tl.load(g + sample * positions + m, m < positions, 0.0)[:, None]
    for start in range(0, length, LENGTH):
        k = start + tl.arange(0, LENGTH)
        inside = (m[:, None] < positions) & (k[None, :] < length)
        where = first + k[None, :] * length_stride
        a = tl.load(features + where, inside, 0.0).to(tl.float32)
        tl.store(out + where, _slope(a, each, P).to(out.dtype.element_ty), inside)


def power_sum(features: Tensor, q: Tensor, layout: Layout, p: int) -> None:
    """Writes Σ |A|^p to q, float32, n × positions."""
    with torch.cuda.device_of(features):
        _sum[_grid(layout)](features, q, *layout[1:], P=p, **_blocks(layout))


def power_grad(features: Tensor, g: Tensor, out: Tensor, layout: Layout, p: int) -> None:
    """Writes g · p·|A|^{p−1}·sign(A) to out, of the features' layout; g float32, n × positions."""
    with torch.cuda.device_of(features):
        _gradient[_grid(layout)](features, g, out, *layout[1:], P=p, **_blocks(layout))


def _blocks(layout: Layout) -> dict[str, int]:
    """A tile: long in the direction that is contiguous."""
    if layout.length_stride == 1:
        length = min(128, triton.next_power_of_2(layout.length))
        return {"POSITIONS": 2048 // length, "LENGTH": length}
    return {"POSITIONS": 128, "LENGTH": 16}


def _grid(layout: Layout) -> tuple[int, int]:
    """Samples first: of the second there may be 65,535 at most."""
    return layout.n, triton.cdiv(layout.positions, _blocks(layout)["POSITIONS"])
