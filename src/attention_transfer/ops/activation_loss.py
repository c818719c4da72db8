"""The activation loss with its backward written out, for eager training; a compiler is given the formulas of `maps`.

Q = Σ_c |A_c|^p (or max_c), Y = Q / r, r = max(‖Q‖₂, 1e-12). With g = ∂L/∂Y, the rest of the loss being N×M in size:
    ∂L/∂Q   = (g − Y·⟨Y, g⟩) / r      (without the projection where ‖Q‖₂ is below the bound)
    ∂L/∂A_c = ∂L/∂Q · p·|A_c|^{p−1}·sign(A_c)      for `sum`; for `max` at the arg-max channel only
Nothing is kept for it but A as it came (no float32 copy), r of each sample, and what is N×M. The backwards are written
in differentiable operations of what they kept, so they have derivatives of every order, forward mode included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .kernels import normalize, normalize_backward, power_grad, power_sum

EPS = 1e-12


def reduced(features: Tensor, kind: str, p: float, axis: str) -> Tensor:
    """Q of features (N, C, H, W) or (N, L, D): (N, H·W) or (N, L); with `axis="channel"` (N, C) or (N, D)."""
    if kind == "sum":
        return PowerSum.apply(features, p, axis).flatten(1)
    # A at its arg-max is N×M in size, and the gradient of `gather` goes back there alone.
    if axis == "channel":
        dim, features = (2, features.flatten(2)) if features.ndim == 4 else (1, features)
    elif features.ndim == 4:
        # `gather` returns its gradient contiguous: in this view that is the layout of the features.
        dim, features = (
            (3, features.permute(0, 2, 3, 1)) if features.stride(1) == 1 else (1, features)
        )
    else:
        dim = 2
    index = features.detach().abs().max(dim, keepdim=True).indices
    return power(wide(features.gather(dim, index)), p).flatten(1)


def normalized(q: Tensor) -> Tensor:
    """Y = Q / max(‖Q‖₂, 1e-12), row by row: (N, M) -> (N, M)."""
    return Normalize.apply(q)[0]


class PowerSum(torch.autograd.Function):
    """Σ |A|^p in at least float32: (N, 1, H, W) or (N, L, 1); with `axis="channel"` (N, C, 1, 1) or (N, 1, D)."""

    # Not by `setup_context`, which costs 15 µs a call and serves `torch.func`, where the formulas of `maps` are used.
    @staticmethod
    def forward(ctx: Any, features: Tensor, p: float, axis: str) -> Tensor:
        ctx.p, ctx.axis = p, axis
        ctx.save_for_backward(features)
        ctx.save_for_forward(features)
        removed = _removed(features, axis)
        q = power_sum(features, p, removed)
        return power(wide(features), p).sum(removed, keepdim=True) if q is None else q

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (features,) = ctx.saved_tensors
        slope = power_grad(features, ctx.p, _removed(features, ctx.axis), g)
        return (
            _slope(wide(features), ctx.p, g).to(features.dtype) if slope is None else slope,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (features,) = ctx.saved_tensors
        return _slope(wide(features), ctx.p, wide(tangent)).sum(
            _removed(features, ctx.axis), keepdim=True
        )


class Normalize(torch.autograd.Function):
    """Q (N, M) -> Y (N, M) and r (N, 1), which is an output for the sake of the second derivative."""

    @staticmethod
    def forward(ctx: Any, q: Tensor) -> tuple[Tensor, Tensor]:
        if (found := normalize(q)) is None:
            # Scaled, or squares of Q > 1e19 (p = 4 and |A| > 6e4) overflow in float32.
            scale = q.abs().amax(1, keepdim=True).clamp_min(EPS)
            r = (scale * torch.linalg.vector_norm(q / scale, dim=1, keepdim=True)).clamp_min(EPS)
            found = q / r, r
        ctx.save_for_backward(*found)
        ctx.save_for_forward(*found)
        return found

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_r: Tensor) -> Tensor:
        y, r = ctx.saved_tensors
        if (found := normalize_backward(y, r, g, g_r)) is not None:
            return found
        along = (y * g).sum(1, keepdim=True) - r * g_r
        return (g - y * torch.where(r > EPS, along, 0.0)) / r

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor]:
        y, r = ctx.saved_tensors
        along = torch.where(r > EPS, (y * tangent).sum(1, keepdim=True), 0.0)
        return (tangent - y * along) / r, along


def wide(x: Tensor) -> Tensor:
    """In at least float32: in float16 |A|^p overflows and 1e-12 vanishes."""
    return x if x.dtype == torch.float64 else x.float()


def power(a: Tensor, p: float) -> Tensor:
    """|a|^p with the derivatives at 0 that the method states (the second is 0 where 1 < p < 2)."""
    if p == 1:
        return a.abs()
    if p == 2:
        return a.square()
    if p % 2 == 0:
        return power(a.square(), p / 2)
    if p >= 2:
        return a.abs().pow(p)
    zero = a == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, a).abs().pow(p))


def _removed(features: Tensor, axis: str) -> tuple[int, ...]:
    """The dimensions that the map is summed over."""
    if features.ndim == 4:
        return (1,) if axis == "space" else (2, 3)
    return (2,) if axis == "space" else (1,)


def _slope(a: Tensor, p: float, factor: Tensor) -> Tensor:
    """factor · p·|a|^{p−1}·sign(a), in the memory format of `a`."""
    if p == 1:
        return a.sgn() * factor
    if p == 2:
        return a * (2 * factor)
    if p % 2 == 0:
        return a * power(a, p - 2) * (p * factor)
    return a.sgn() * power(a, p - 1) * (p * factor)
