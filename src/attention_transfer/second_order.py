"""Input gradients J = ∂ℓ_n/∂x_n of each sample's cross-entropy, and derivatives of losses on J.

Zagoruyko & Komodakis, ICLR 2017, section 3.2. J is the gradient of the *sum* over the batch, so
it does not depend on the batch size. A loss on J needs ∂/∂W ⟨J, v⟩ for the weights W, a mixed
Hessian–vector product. Eager mode uses double backward (J keeps its graph, with the convolutions of
`ops/convolution.py`); a compiled region, which cannot contain a graph of a graph, uses
`torch.func.grad`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from .arguments import check_finite, check_module, check_same_device, check_switch, check_tensor
from .errors import UserError, first_few, plural
from .numerics import check_logits, cross_entropy
from .ops.convolution import TwiceDifferentiable

# x -> (logits, features)
ForwardFn = Callable[[Tensor], tuple[Tensor, list[Tensor]]]


class BatchStatisticsWarning(UserWarning):
    """Batch normalisation in training mode makes input gradients depend on the batch."""


def input_gradient(model: nn.Module, x: Tensor, y: Tensor, create_graph: bool = False) -> Tensor:
    """J, the gradient of each sample's cross-entropy with respect to its own input.

    Zagoruyko & Komodakis, ICLR 2017, section 3.2. J does not shrink with the batch size: it is the
    gradient of the sum over the batch.

    Args:
        model: images (N, C, H, W) -> logits (N, K). Batch normalisation in training mode couples
            the samples, which gives a warning.
        x: images (N, C, H, W).
        y: labels (N,), int64, or probabilities (N, K).
        create_graph: whether a loss on J can be differentiated with respect to the model's
            parameters.

    Returns:
        J (N, C, H, W), in the dtype of x.

    Raises:
        UserError: (a ValueError) for wrong shapes, and for `create_graph=True` with a compiled
            model; in eager mode on a CPU also for gradients that are not finite.
    """
    check_module(model, "model")
    check_switch(create_graph, "create_graph")
    compiled = hasattr(model, "_orig_mod") or model._compiled_call_impl is not None
    if create_graph and compiled and not torch.compiler.is_compiling():
        raise UserError(
            "a compiled model cannot be differentiated twice from outside (create_graph=True): "
            "pass the plain model, or compile the function that calls input_gradient"
        )
    if not torch.compiler.is_compiling() and (text := batch_dependence(model, "the model")):
        warnings.warn(f"{text}: put the model in eval mode", BatchStatisticsWarning, stacklevel=2)
    with defer_batch_norm_counters(model):
        j = logits_and_input_gradient(
            lambda x: (check_logits(model(x), "the model"), []), x, y, create_graph
        )[0]
    check_finite(j, {"x": x}, "the input gradients of the model are not finite")
    return j


def logits_and_input_gradient(
    forward: ForwardFn, x: Tensor, y: Tensor, create_graph: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(J, logits, features) from one forward and one backward pass.

    Only with `create_graph` can they be differentiated with respect to the parameters.

    Raises:
        UserError: for wrong shapes and dtypes, and in `torch.inference_mode`.
    """
    check_batch(x, y)
    if torch.compiler.is_compiling():
        return _by_torch_func(forward, x, y, create_graph)
    return _by_double_backward(forward, x, y, create_graph)


def _by_double_backward(
    forward: ForwardFn, x: Tensor, y: Tensor, create_graph: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    convolutions = TwiceDifferentiable()
    with torch.enable_grad():
        # If x itself has a graph (an augmented image, for example), a loss on J reaches that graph.
        if not (create_graph and x.requires_grad):
            x = x.detach().requires_grad_()
        with convolutions if create_graph else nullcontext():
            logits, features = forward(x)
        total = _cross_entropy_sum(logits, y)
        # Only the gradient of x is needed, so convolutions need not compute those of weights.
        convolutions.inputs_only = True
        with torch.autocast(x.device.type, enabled=False):
            (j,) = torch.autograd.grad(total, x, create_graph=create_graph)
        convolutions.inputs_only = False
    if create_graph:
        return j, logits, features
    return j, logits.detach(), [f.detach() for f in features]


def _by_torch_func(
    forward: ForwardFn, x: Tensor, y: Tensor, create_graph: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    def loss(x: Tensor) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        logits, features = forward(x)
        return _cross_entropy_sum(logits, y), (logits, features)

    # `torch.func.grad` works inside no_grad, which only prevents the outer graph.
    with nullcontext() if create_graph else torch.no_grad():
        j, (logits, features) = torch.func.grad(loss, has_aux=True)(x)
    return j, logits, features


def check_batch(x: Tensor, y: Tensor) -> None:
    """Raises `UserError` unless x and y are a batch, and in inference mode."""
    check_tensor(x, "x")
    check_tensor(y, "y")
    check_same_device(x, "x", y, "y")
    if y.is_floating_point():
        labels_fit = y.ndim == 2 and len(y) == len(x)
    else:
        labels_fit = y.shape == x.shape[:1]
    if x.ndim < 2 or not x.is_floating_point() or 0 in x.shape or not labels_fit:
        raise UserError(
            f"input gradients of images {tuple(x.shape)} {x.dtype} and labels {tuple(y.shape)} "
            f"{y.dtype}: expected (N, C, H, W) of floats and (N,) of class numbers, or (N, K) of "
            "probabilities"
        )
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        raise UserError(
            "input gradients are not available in torch.inference_mode(): use torch.no_grad()"
        )


def _cross_entropy_sum(logits: Tensor, y: Tensor) -> Tensor:
    """The sum over the batch, in at least float32 even under autocast."""
    with torch.autocast(logits.device.type, enabled=False):
        return cross_entropy(logits, y, reduction="sum")


@contextmanager
def defer_batch_norm_counters(model: nn.Module) -> Iterator[None]:
    """In a compiled region, lets batch normalisation count its batches after the block.

    Buffers are read-only under `torch.func`.
    """
    layers = []
    if torch.compiler.is_compiling():
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        layers = [m for m in model.modules() if isinstance(m, kinds) and m.training]
    # Without a momentum, the running averages need the counter during the block.
    layers = [m for m in layers if m.num_batches_tracked is not None and m.momentum is not None]
    counts = [layer.num_batches_tracked for layer in layers]
    # Not by name: PyTorch 2.11 cannot compile the hook that then sees the buffer.
    for layer in layers:
        layer._buffers["num_batches_tracked"] = None
    try:
        yield
    finally:
        for layer, count in zip(layers, counts, strict=True):
            layer._buffers["num_batches_tracked"] = count
    # After an error this is not reached, and nothing is counted.
    for count in counts:
        count.add_(1)  # type: ignore[union-attr]


def batch_dependent_layers(model: nn.Module) -> list[str]:
    """The layers that use statistics of the batch in their current mode."""
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        # Without running statistics, the layer uses those of the batch in eval mode as well.
        if module.training or module.running_mean is None:
            names.append(name)
    return names


def batch_dependence(model: nn.Module, name: str) -> str | None:
    """A message if layers of the model make its input gradients depend on the batch."""
    layers = batch_dependent_layers(model)
    if not layers:
        return None
    return (
        f"{name} uses statistics of the batch in {plural(len(layers), 'layer')} "
        f"({first_few(layers, 1)}), so its input gradients depend on the rest of the batch"
    )
