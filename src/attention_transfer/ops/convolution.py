"""Convolution whose gradient's gradient is made of ordinary convolution kernels.

With y = w * x and g = ∂L/∂y, the gradient with respect to the input is gx(g, w), linear in both. For ∂(v·gx):
    with respect to g: w * v, a convolution;   with respect to w: the weight gradient of a convolution of v, given g
PyTorch's own double backward writes the second as a convolution whose kernel is as large as the image, which costs
several times as much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class TwiceDifferentiable(TorchFunctionMode):
    """Inside the block every convolution is one of these. While `inputs_only`, a backward pass with a graph is taken to
    be after inputs alone and leaves the gradients of parameters out."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs_only = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _CONVOLUTIONS:
            return func(*args, **kwargs)
        given = dict(zip(_NAMES, args, strict=False)) | kwargs
        x, w = given["input"], given["weight"]
        dims = w.ndim - 2
        if isinstance(given.get("padding", 0), str) or x.ndim != dims + 2 or x.is_complex():
            return func(*args, **kwargs)
        b = given.get("bias")
        # A weight that is computed may have been computed from the input.
        computed = tuple(t is not None and not t.is_leaf for t in (w, b))
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x, w, b = (_cast(t, torch.get_autocast_dtype(device)) for t in (x, w, b))
        defaults = {"stride": 1, "padding": 0, "dilation": 1}
        options = tuple(_each(given.get(name, default), dims) for name, default in defaults.items())
        with torch.autocast(device, enabled=False):
            return _Convolution.apply(x, w, b, (*options, given.get("groups", 1)), computed, self)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        options: Any,
        computed: Any,
        mode: TwiceDifferentiable,
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.options, ctx.computed, ctx.mode = options, computed, mode
        stride, padding, dilation, groups = options
        return torch.convolution(
            x, w, b, stride, padding, dilation, False, (0,) * len(stride), groups
        )

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        if torch.is_grad_enabled() and ctx.mode.inputs_only:
            gx = _InputGradient.apply(g, w, x, ctx.options)
            gw, gb = (
                _backward(g, x, w, ctx.options, (False, *ctx.computed))[1:]
                if any(ctx.computed)
                else (None, None)
            )
            return gx, gw, gb, None, None, None
        return (*_backward(g, x, w, ctx.options, ctx.needs_input_grad[:3]), None, None, None)


class _InputGradient(torch.autograd.Function):
    """gx(g, w); x gives its shape only."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, w: Tensor, x: Tensor, options: Any) -> Tensor:
        ctx.save_for_backward(g, w)
        ctx.options = options
        return _backward(g, x, w, options, (True, False, False))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        g, w = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        v = v.to(g.dtype)
        gg = torch.convolution(
            v, w, None, stride, padding, dilation, False, (0,) * len(stride), groups
        )
        return gg, _backward(g, v, w, ctx.options, (False, True, False))[1], None, None


def _backward(
    g: Tensor, x: Tensor, w: Tensor, options: Any, needed: tuple[bool, bool, bool]
) -> tuple[Any, ...]:
    stride, padding, dilation, groups = options
    output_padding = (0,) * len(stride)
    return torch.ops.aten.convolution_backward(
        g, x, w, [w.shape[0]], stride, padding, dilation, False, output_padding, groups, needed
    )


def _each(value: Any, dims: int) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * dims if len(value) == 1 else value


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or t.dtype == torch.float64 else t.to(dtype)
