"""Batch normalisation for compiled training on a CPU, with fewer passes over memory.

Statistics are computed for each sample over H×W and combined over the batch (Chan et al., 1979), so
every reduction is short and parallel. The backward reads its input twice and stores no other tensor
of that size. With x̂ = (x − μ)/σ, n = N·H·W and g = ∂L/∂y:

    ∂L/∂b = Σ g,   ∂L/∂w = Σ g·x̂,   ∂L/∂x = (w/σ)·(g − ∂L/∂b/n − x̂·∂L/∂w/n)

A compiled step without it takes 1.04 times as long (results/bench.md).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..numerics import at_least_float32


def use_in(model: nn.Module) -> int:
    """Makes every plain `nn.BatchNorm2d` use this op in training; returns their number."""
    modules = [m for m in model.modules() if type(m) is nn.BatchNorm2d]
    chosen = [m for m in modules if m.affine and m.track_running_stats]
    for module in chosen:
        # Changing the class keeps parameters, buffers and hooks; the module can still be pickled.
        module.__class__ = CompiledBatchNorm2d
    return len(chosen)


class CompiledBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with the values of `BatchNorm` in training; it has no second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        count = x.numel() // x.shape[1]
        # PyTorch's own: in eval mode, for its errors (such as one value per channel), and for the
        # cumulative average that no momentum means.
        if not self.training or x.ndim != 4 or count < 2 or self.momentum is None:
            return super().forward(x)
        y, mean, variance = BatchNorm.apply(x, self.weight, self.bias, self.eps)
        running_mean, running_var = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        with torch.no_grad():
            cast(Tensor, self.num_batches_tracked).add_(1)
            running_mean.lerp_(mean.to(running_mean.dtype), self.momentum)
            unbiased = variance * (count / (count - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), self.momentum)
        return cast(Tensor, y)


class BatchNorm(torch.autograd.Function):
    """x (N, C, H, W), weight, bias (C,) -> y in the dtype of x, mean and biased variance (C,)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = at_least_float32(x)
        variances, means = torch.var_mean(wide, (2, 3), correction=0)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        inverse = (variance + eps).rsqrt()
        y = (wide - _channels(mean)) * _channels(inverse * weight) + _channels(bias)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.mark_non_differentiable(mean, variance)
        return y.to(x.dtype), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, inverse = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        g, centred = at_least_float32(g), at_least_float32(x) - _channels(mean)
        db = g.sum((2, 3)).sum(0)
        dw = (g * centred).sum((2, 3)).sum(0) * inverse
        scale = inverse * weight
        dx = (
            _channels(scale) * g
            - centred * _channels(scale * inverse * dw / count)
            - _channels(scale * db / count)
        )
        return dx.to(x.dtype), dw.to(weight.dtype), db.to(weight.dtype), None


def _channels(x: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, 1)."""
    return x.view(1, -1, 1, 1)
