"""One run of a network on an example, as a tree of calls with the shapes of their features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from .capture import call_uncompiled, evaluating
from .layout import Size, feature_map, find_layout, read_hints

NORMS = (
    nn.modules.batchnorm._NormBase,
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm),
)


@dataclass
class Call:
    """One call of a module: the features that it returned, if any, and the calls inside it."""

    name: str
    module: nn.Module
    shape: tuple[int, ...] | None = None  # of the features, as `tap` gives them
    size: Size | None = None  # (h, w) of the features; None for 1×1 too
    depth: int = 0  # number of layers with weights that ran before its end
    children: list[Call] = field(default_factory=list)

    def descendants(self) -> Iterator[Call]:
        for call in self.children:
            yield call
            yield from call.descendants()

    @property
    def has_weights(self) -> bool:
        """Whether this layer itself mixes channels or positions: a convolution, a linear layer.

        A container with a position embedding does not, nor does a scale per channel.
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
    handles = []
    for name, module in model.named_modules():
        if name == "":
            continue

        def enter(m: nn.Module, args: Any, name: str = name) -> None:
            call = Call(name, m)
            stack[-1].children.append(call)
            stack.append(call)

        def leave(m: nn.Module, args: Any, output: Any) -> None:
            nonlocal layers_run
            call = stack.pop()
            layers_run += call.has_weights
            call.depth = layers_run
            _set_shape(call, model, output, image, batch)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with evaluating(model):
            call_uncompiled(model, example)
    except AssertionError as error:  # timm's and torchvision's transformers assert the image size
        raise UserError(
            f"{type(model).__name__} does not take images {tuple(example.shape)}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return root


def _set_shape(call: Call, model: nn.Module, output: Any, image: Size, batch: int) -> None:
    """Sets shape and size if the output holds one feature map."""
    if output is None or (isinstance(output, Tensor) and output.ndim not in (3, 4)):
        return
    hints = read_hints(model, call.name)
    try:
        features = feature_map(output, call.name, image, batch, hints)
    except UserError:
        return
    # Swin folds windows into the batch, some attentions their heads: no feature maps of an image.
    if features.shape[0] != batch or not features.is_floating_point():
        return
    layout = find_layout(features.shape, image, hints)
    if layout is not None:
        call.shape = tuple(layout.features(features).shape)
        call.size = None if layout.grid == (1, 1) else layout.grid
