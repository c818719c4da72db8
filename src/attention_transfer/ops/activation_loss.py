"""The activation loss with a hand-written backward, for eager mode; `maps` has the plain formulas.

Q = Σ_c |A_c|^p (or max_c), Y = Q / r, r = max(‖Q‖₂, 1e-12). With g = ∂L/∂Y, of
size N×M as in the rest of the loss:
    ∂L/∂Q   = (g − Y·⟨Y, g⟩) / r      (without the projection where ‖Q‖₂ is below the bound)
    ∂L/∂A_c = ∂L/∂Q · p·|A_c|^{p−1}·sign(A_c)      for `sum`; for `max` at the arg-max channel only
Backward keeps A in its own dtype (no float32 copy), r of each sample, and tensors of the size N×M.
It consists of differentiable operations on these, so derivatives of every order and forward mode
work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..numerics import EPS, at_least_float32, power
from . import kernels


def raw_map(features: Tensor, kind: str, p: float, axis: str) -> Tensor:
    """Q, of the shape (N, H·W) or (N, L); with `axis="channel"` (N, C) or (N, D)."""
    if kind == "sum":
        return PowerSum.apply(features, p, axis).flatten(1)
    # Only the elements at the arg-max, N×M of them, are kept and get a gradient.
    features, dim = reduction_view(features, axis)
    index = features.detach().abs().max(dim, keepdim=True).indices
    return power(at_least_float32(features.gather(dim, index)), p).flatten(1)


class PowerSum(torch.autograd.Function):
    """Σ |A|^p in at least float32; the summed dimensions are kept as 1."""

    # `setup_context` would slow each call down. Only `torch.func` needs it, and there the formulas
    # of `maps` are used.
    @staticmethod
    def forward(ctx: Any, features: Tensor, p: float, axis: str) -> Tensor:
        ctx.p, ctx.dims = p, summed_dims(features, axis)
        # The features themselves, because a copy would double their memory.
        ctx.save_for_backward(features)
        ctx.save_for_forward(features)
        q = kernels.power_sum(features, p, ctx.dims)
        if q is None:
            q = power(at_least_float32(features), p).sum(ctx.dims, keepdim=True)
        return q

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (features,) = ctx.saved_tensors
        gradient = kernels.power_grad(features, ctx.p, ctx.dims, g)
        if gradient is None:
            gradient = power_grad(at_least_float32(features), ctx.p, g).to(features.dtype)
        return gradient, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (features,) = ctx.saved_tensors
        product = power_grad(at_least_float32(features), ctx.p, at_least_float32(tangent))
        return product.sum(ctx.dims, keepdim=True)


class Normalize(torch.autograd.Function):
    """Q (N, M) -> Y (N, M) and r (N, 1); r is an output so that the second derivative exists."""

    @staticmethod
    def forward(ctx: Any, q: Tensor) -> tuple[Tensor, Tensor]:
        outputs = kernels.normalize(q)
        if outputs is None:
            # Scaled, because the squares of Q > 1e19 (p = 4 and |A| > 6e4) overflow in float32.
            scale = q.abs().amax(1, keepdim=True).clamp_min(EPS)
            r = (scale * torch.linalg.vector_norm(q / scale, dim=1, keepdim=True)).clamp_min(EPS)
            outputs = q / r, r
        ctx.save_for_backward(*outputs)
        ctx.save_for_forward(*outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_r: Tensor) -> Tensor:
        y, r = ctx.saved_tensors
        gradient = kernels.normalize_backward(y, r, g, g_r)
        if gradient is None:
            along = (y * g).sum(1, keepdim=True) - r * g_r
            gradient = (g - y * torch.where(r > EPS, along, 0.0)) / r
        return gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor]:
        y, r = ctx.saved_tensors
        along = torch.where(r > EPS, (y * tangent).sum(1, keepdim=True), 0.0)
        return (tangent - y * along) / r, along


def reduction_view(features: Tensor, axis: str) -> tuple[Tensor, int]:
    """(The features in the order of their memory, the one dimension that the map reduces).

    A compiler and `gather` then write gradients in the same order, without another copy.
    """
    if axis == "channel":
        if features.ndim == 3:
            return features, 1
        return features.flatten(2), 2
    if axis != "space":
        raise UserError(f"unknown axis {axis!r}")
    if features.ndim == 3:
        return features, 2
    if features.is_contiguous():
        return features, 1
    return features.permute(0, 2, 3, 1), 3


def summed_dims(features: Tensor, axis: str) -> tuple[int, ...]:
    """The dimensions that the map is summed over."""
    if axis == "space":
        return (1,) if features.ndim == 4 else (2,)
    return (2, 3) if features.ndim == 4 else (1,)


def power_grad(a: Tensor, p: float, factor: Tensor) -> Tensor:
    """factor · p·|a|^{p−1}·sign(a), in the memory format of `a`."""
    if p == 1:
        return a.sgn() * factor
    if p == 2:
        return a * (2 * factor)
    if p % 2 == 0:
        # For an even power a product is cheaper than the sign.
        return a * power(a, p - 2) * (p * factor)
    return a.sgn() * power(a, p - 1) * (p * factor)
