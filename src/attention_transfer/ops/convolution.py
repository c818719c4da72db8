"""Convolution whose double backward consists of ordinary convolution kernels.

With y = w * x and g = ∂L/∂y, the gradient with respect to the input is gx(g, w), linear in both.
For ∂(v·gx):
    with respect to g: w * v, a convolution
    with respect to w: the weight gradient of a convolution of v, given g
PyTorch's own double backward computes the second as a convolution whose kernel is as large as the
image, which costs several times as much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_PARAMETERS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class TwiceDifferentiable(TorchFunctionMode):
    """Inside the block every convolution has the cheap double backward.

    While `inputs_only` is set, a backward pass with a graph computes the gradients of inputs only,
    not those of parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inputs_only = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _CONVOLUTIONS:
            return func(*args, **kwargs)
        arguments = dict(zip(_PARAMETERS, args, strict=False)) | kwargs
        x, w, b = arguments["input"], arguments["weight"], arguments.get("bias")
        dims = w.ndim - 2
        # PyTorch handles padding="same", inputs without a batch and complex numbers.
        if isinstance(arguments.get("padding", 0), str) or x.ndim != dims + 2 or x.is_complex():
            return func(*args, **kwargs)
        # A computed weight may depend on the input.
        computed = tuple(t is not None and not t.is_leaf for t in (w, b))
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x, w, b = (_cast(t, torch.get_autocast_dtype(device)) for t in (x, w, b))
        defaults = {"stride": 1, "padding": 0, "dilation": 1}
        sizes = [_per_dim(arguments.get(name, value), dims) for name, value in defaults.items()]
        options = (*sizes, arguments.get("groups", 1))
        # Autocast does not cast for a custom Function, so the inputs are cast above.
        with torch.autocast(device, enabled=False):
            return _Convolution.apply(x, w, b, options, computed, self)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        options: Any,
        computed: tuple[bool, bool],
        mode: TwiceDifferentiable,
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.options, ctx.computed, ctx.mode = options, computed, mode
        return _convolve(x, w, b, options)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        if not (torch.is_grad_enabled() and ctx.mode.inputs_only):
            gradients = _gradients(g, x, w, ctx.options, ctx.needs_input_grad[:3])
            return *gradients, None, None, None
        gx = _InputGradient.apply(g, w, x, ctx.options)
        gw = gb = None
        if any(ctx.computed):
            _, gw, gb = _gradients(g, x, w, ctx.options, (False, *ctx.computed))
        return gx, gw, gb, None, None, None


class _InputGradient(torch.autograd.Function):
    """gx(g, w); only the shape of x is used."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, w: Tensor, x: Tensor, options: Any) -> Tensor:
        ctx.save_for_backward(g, w)
        ctx.options = options
        return _gradients(g, x, w, options, (True, False, False))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        g, w = ctx.saved_tensors
        v = v.to(g.dtype)  # under autocast J is float32, the convolution's g bfloat16
        gg = _convolve(v, w, None, ctx.options)
        gw = _gradients(g, v, w, ctx.options, (False, True, False))[1]
        return gg, gw, None, None


def _convolve(x: Tensor, w: Tensor, b: Tensor | None, options: Any) -> Tensor:
    stride, padding, dilation, groups = options
    output_padding = (0,) * len(stride)
    return torch.convolution(x, w, b, stride, padding, dilation, False, output_padding, groups)


def _gradients(
    g: Tensor, x: Tensor, w: Tensor, options: Any, needed: tuple[bool, bool, bool]
) -> tuple[Any, ...]:
    """The gradients of (x, w, b), None where not needed."""
    stride, padding, dilation, groups = options
    output_padding = (0,) * len(stride)
    return torch.ops.aten.convolution_backward(
        g, x, w, [w.shape[0]], stride, padding, dilation, False, output_padding, groups, needed
    )


def _per_dim(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        return values * dims
    return values


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if t is None or t.dtype == torch.float64:
        return t
    return t.to(dtype)
