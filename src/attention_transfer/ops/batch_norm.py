"""Batch normalisation in training, written for a compiler: fewer and cheaper passes on a CPU than its own.

Statistics are taken per sample over H×W and then joined over the batch (Chan et al., 1979), so that every reduction is
short and parallel; the backward reads its input twice and keeps nothing of feature size but that input. With
x̂ = (x − μ)/σ, n = N·H·W and g = ∂L/∂y:
    ∂L/∂b = Σ g,   ∂L/∂w = Σ g·x̂,   ∂L/∂x = (w/σ)·(g − ∂L/∂b/n − x̂·∂L/∂w/n)
Values are those of `nn.BatchNorm2d`, closer to float64 than its own float32 (tests/ops/test_batch_norm.py).
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def use_in(model: nn.Module) -> int:
    """Lets every plain `nn.BatchNorm2d` of `model` train by this op; the number of them. Worth it where compiled."""
    found = [
        m
        for m in model.modules()
        if type(m) is nn.BatchNorm2d and m.affine and m.track_running_stats
    ]
    for module in found:
        module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]
    return len(found)


def _forward(self: nn.BatchNorm2d, x: Tensor) -> Tensor:
    count = x.numel() // x.shape[1]
    if not self.training or x.ndim != 4 or count < 2 or self.momentum is None:
        return nn.BatchNorm2d.forward(self, x)
    y, mean, variance = BatchNorm.apply(x, self.weight, self.bias, self.eps)
    with torch.no_grad():
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)  # type: ignore[union-attr]
        unbiased = variance * (count / (count - 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)  # type: ignore[union-attr]
    return y


class BatchNorm(torch.autograd.Function):
    """(N, C, H, W), weight and bias (C,) -> normalised x in the input's dtype, mean (C,), biased variance (C,)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = _wide(x)
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
        wide, centred = _wide(g), _wide(x) - _channels(mean)
        db = wide.sum((2, 3)).sum(0)
        dw = (wide * centred).sum((2, 3)).sum(0) * inverse
        scale = inverse * weight
        dx = (
            _channels(scale) * wide
            - centred * _channels(scale * inverse * dw / count)
            - _channels(scale * db / count)
        )
        return dx.to(x.dtype), dw.to(weight.dtype), db.to(weight.dtype), None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _channels(x: Tensor) -> Tensor:
    return x.view(1, -1, 1, 1)
