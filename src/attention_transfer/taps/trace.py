"""One run of a network on an example, as a tree of calls with the shapes of their features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from .capture import call_uncompiled, evaluating
from .layout import Size, feature_map, find_layout, is_per_image, read_hints

NORMS = (
    nn.modules.batchnorm._NormBase,
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm),
)


@dataclass
class Call:
    """One call of a module: the shape of its features, if it returned any, and the inner calls."""

    name: str
    module: nn.Module
    shape: tuple[int, ...] = ()  # of the features, as `tap` returns them; empty if there are none
    size: Size | None = None  # (h, w) of the features; None if there are none or they are 1×1
    depth: int = 0  # number of layers with weights that ran before its end
    children: list[Call] = field(default_factory=list)

    def descendants(self) -> Iterator[Call]:
        for call in self.children:
            yield call
            yield from call.descendants()

    @property
    def has_weights(self) -> bool:
        """Whether this layer itself mixes channels or positions: a convolution, a linear layer.

        A container with a position embedding does not count, and a scale per channel does not.
        """
        if isinstance(self.module, (nn.modules.conv._ConvNd, nn.Linear)):
            return True
        if self.children or isinstance(self.module, NORMS):
            return False
        # A matrix has two axes longer than 1; the (C, 1, 1) of a layer scale has one.
        for parameter in self.module.parameters(recurse=False):
            if sum(n > 1 for n in parameter.shape) >= 2:
                return True
        return False


def trace(model: nn.Module, example: Tensor) -> Call:
    """Runs the model once in eval mode; the root of the tree is the model itself.

    Raises:
        UserError: if the model asserts another image size.
    """
    root = Call("", model)
    stack = [root]
    layers_run = 0
    image, batch = (example.shape[-2], example.shape[-1]), example.shape[0]

    def enter(name: str, module: nn.Module, args: Any) -> None:
        call = Call(name, module)
        stack[-1].children.append(call)
        stack.append(call)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal layers_run
        call = stack.pop()
        layers_run += call.has_weights
        call.depth = layers_run
        _set_shape(call, model, output, image, batch)

    with ExitStack() as hooks, evaluating(model):
        for name, module in model.named_modules():
            if module is not model:
                hooks.enter_context(module.register_forward_pre_hook(partial(enter, name)))
                hooks.enter_context(module.register_forward_hook(leave))
        try:
            call_uncompiled(model, example)
        except AssertionError as error:  # transformers of timm and torchvision assert the size
            raise UserError(
                f"{type(model).__name__} does not take images {tuple(example.shape)}: {error}"
            ) from error
    return root


def depth_share(model: nn.Module, layer: str, example: Tensor) -> float:
    """The share of the layers with weights that have run when the last call of `layer` ends.

    Raises:
        UserError: as `trace`, and if the model does not call `layer`.
    """
    calls = list(trace(model, example).descendants())
    depths = [call.depth for call in calls if call.name == layer]
    if not depths:
        raise UserError(f"{type(model).__name__} does not call its layer {layer}")
    return max(depths) / max(1, *(call.depth for call in calls))


def _set_shape(call: Call, model: nn.Module, output: Any, image: Size, batch: int) -> None:
    """Sets shape and size if the output holds one feature map."""
    if output is None or (isinstance(output, Tensor) and output.ndim not in (3, 4)):
        return
    hints = read_hints(model, call.name)
    try:
        features = feature_map(output, call.name, image, batch, hints)
    except UserError:
        return
    if not is_per_image(features, batch):
        return
    layout = find_layout(features.shape, image, hints)
    if layout is not None:
        call.shape = tuple(layout.features(features).shape)
        call.size = None if layout.grid == (1, 1) else layout.grid
