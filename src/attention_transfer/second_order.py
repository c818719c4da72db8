"""J = ∂ℓ_n/∂x_n, the gradient of each sample's own cross-entropy with respect to its own input, and the ways to train
through it (Zagoruyko & Komodakis, ICLR 2017, section 3.2).

Of the *sum* over the batch, so that J does not shrink with it. A loss on J has second derivatives of the network; what
they ask of the weights, ∂/∂W ⟨J, v⟩, is a mixed Hessian–vector product. Three ways lead to the same numbers:

`double-backward`       J keeps its graph, and the backward pass goes through it (convolutions by `ops/convolution.py`)
`func`                  `torch.func.grad`, which is what a compiled region can hold
`forward-over-reverse`  J without a graph; then ⟨J, v⟩ as the forward-mode derivative of the loss along v = ∂L/∂J
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError
from .ops.activation_loss import wide
from .ops.convolution import TwiceDifferentiable

SECOND_ORDER_MODES = ("auto", "double-backward", "func", "forward-over-reverse")


class BatchStatisticsWarning(UserWarning):
    """The student's batch normalisation is in training mode, so that its input gradients are not each sample's own."""


# x -> (logits, what else the forward pass gives, a list of tensors)
Run = Callable[[Tensor], tuple[Tensor, list[Tensor]]]


def input_gradient(model: nn.Module, x: Tensor, y: Tensor, create_graph: bool = False) -> Tensor:
    """J, the gradient of each sample's cross-entropy with respect to its own input.

    Args:
        model: images (N, C, H, W) -> logits (N, K). Batch normalisation in training mode couples the samples, which is
            warned of.
        x: images (N, C, H, W).
        y: labels (N,), int64, or probabilities (N, K).
        create_graph: whether a loss on J is to be differentiated once more, with respect to the model's parameters.

    Returns:
        J (N, C, H, W), in the dtype of x.

    Raises:
        UserError: (a ValueError) for shapes that are no batch, and for `create_graph=True` over a compiled model.
    """
    compiled = hasattr(model, "_orig_mod") or model._compiled_call_impl is not None
    if create_graph and compiled and not torch.compiler.is_compiling():
        raise UserError(
            "a compiled model cannot be differentiated twice from outside (create_graph=True): hand in the plain "
            "model, or compile the function that calls input_gradient"
        )
    if not torch.compiler.is_compiling() and (layers := batch_dependent_layers(model)):
        warnings.warn(
            f"{len(layers)} layers normalise by their batch ({layers[0]}, …), so that the input gradients depend on "
            "the rest of the batch: put the model in eval mode",
            stacklevel=2,
        )
    way = "func" if torch.compiler.is_compiling() else "double-backward"
    with defer_batch_norm_counters(model, way):
        return logits_and_input_gradient(lambda x: (model(x), []), x, y, create_graph, way)[0]


def logits_and_input_gradient(
    run: Run, x: Tensor, y: Tensor, create_graph: bool, way: str = "double-backward"
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(J, logits, the rest) of one forward and one backward pass by `double-backward` or `func`.

    With `create_graph` all three can be differentiated with respect to the parameters; without it none.

    Raises:
        UserError: for shapes and dtypes that are no batch, and in `torch.inference_mode`.
    """
    _check_batch(x, y)
    if way == "func":
        try:
            with nullcontext() if create_graph else torch.no_grad():
                j, (logits, rest) = torch.func.grad(_loss_of(run, y), has_aux=True)(x)
        except RuntimeError as error:
            raise _not_by("func", error) from None
        return j, logits, rest
    mode = TwiceDifferentiable()
    with torch.enable_grad():
        x = x if create_graph and x.requires_grad else x.detach().requires_grad_()
        with mode if create_graph else nullcontext():
            logits, rest = run(x)
        total = cross_entropy_sum(logits, y)
        mode.inputs_only = True
        with torch.autocast(x.device.type, enabled=False):
            (j,) = torch.autograd.grad(total, x, create_graph=create_graph)
        mode.inputs_only = False
    if create_graph:
        return j, logits, rest
    return j, logits.detach(), [r.detach() for r in rest]


def along(run: Run, x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(⟨J, v⟩, logits, the rest), differentiable with respect to the parameters: forward mode along v (N, C, H, W).

    Raises:
        UserError: where an operation of the network has no forward-mode derivative.
    """
    try:
        _, product, (logits, rest) = torch.func.jvp(  # type: ignore[misc]
            _loss_of(run, y), (x,), (v.detach(),), has_aux=True
        )
    except (NotImplementedError, RuntimeError) as error:
        raise _not_by("forward-over-reverse", error) from None
    return product, logits, rest


def _loss_of(run: Run, y: Tensor) -> Callable[[Tensor], tuple[Tensor, tuple[Tensor, list[Tensor]]]]:
    """x -> the sum of cross-entropies, and beside it logits and the rest."""

    def loss(x: Tensor) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        logits, rest = run(x)
        return cross_entropy_sum(logits, y), (logits, rest)

    return loss


def _not_by(way: str, error: Exception) -> Exception:
    """What to say where `torch.func` cannot hold an operation of the network; any other error as it is."""
    text = str(error)
    if (
        not isinstance(error, NotImplementedError)
        and "torch.func" not in text
        and "transform" not in text
    ):
        return error
    return UserError(f"{way} cannot be had here ({text.splitlines()[0]}): use double-backward")


def _check_batch(x: Tensor, y: Tensor) -> None:
    fits = y.ndim == 2 and len(y) == len(x) if y.is_floating_point() else y.shape == x.shape[:1]
    if x.ndim < 2 or not x.is_floating_point() or not fits:
        raise UserError(
            f"input gradients of images {tuple(x.shape)} {x.dtype} and labels {tuple(y.shape)} {y.dtype}: expected "
            "(N, C, H, W) of floats and (N,) of class numbers, or (N, K) of probabilities"
        )
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        raise UserError(
            "input gradients cannot be had in torch.inference_mode(): use torch.no_grad()"
        )


def cross_entropy_sum(logits: Tensor, y: Tensor) -> Tensor:
    """Over the batch, in at least float32 whatever the autocast."""
    with torch.autocast(logits.device.type, enabled=False):
        logits = wide(logits)
        return F.cross_entropy(
            logits, y.to(logits.dtype) if y.is_floating_point() else y, reduction="sum"
        )


def is_deterministic(model: nn.Module, x: Tensor) -> bool:
    """Whether two forward passes in the model's own mode give the same and change nothing (dropout, statistics)."""
    model = copy.deepcopy(model)
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        before = {k: v.clone() for k, v in model.named_buffers()}
        first, second = model(x), model(x)
    same = all(torch.equal(v, before[k]) for k, v in model.named_buffers())
    return same and torch.equal(first, second)


@contextmanager
def defer_batch_norm_counters(model: nn.Module, way: str) -> Iterator[None]:
    """By `func`, batch normalisation counts its batches after the block: in it, a buffer cannot be added to."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    found = [m for m in model.modules() if way == "func" and isinstance(m, kinds) and m.training]
    found = [m for m in found if m.num_batches_tracked is not None and m.momentum is not None]
    counts = [m.num_batches_tracked for m in found]
    for module in found:
        module.num_batches_tracked = None
    try:
        yield
    finally:
        for module, count in zip(found, counts, strict=True):
            module.num_batches_tracked = count
    for count in counts:
        count.add_(1)  # type: ignore[union-attr]


def has_stochastic_layers(model: nn.Module) -> bool:
    """As `repeatable`, the other way round and by the layers alone: what can be told while a compiler traces."""
    kind = nn.modules.batchnorm._BatchNorm
    training = [m for m in model.modules() if m.training]
    drops = (m for m in training if "Drop" in type(m).__name__)
    random = any((getattr(m, "p", getattr(m, "drop_prob", 1.0)) or 0.0) > 0 for m in drops)
    return random or any(isinstance(m, kind) for m in training)


def batch_dependent_layers(model: nn.Module) -> list[str]:
    """The layers that take statistics over the batch in the mode they are in."""
    kinds = nn.modules.batchnorm._BatchNorm
    return [
        n
        for n, m in model.named_modules()
        if isinstance(m, kinds) and (m.training or m.running_mean is None)
    ]
