"""One run of a network on an example, as a tree of calls: what each module put out, where, and how deep."""

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
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
ELEMENTWISE = (
    *NORMS,
    nn.Identity,
    nn.modules.dropout._DropoutNd,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Sigmoid,
    nn.Tanh,
)


@dataclass
class Call:
    """One call of a module: the features it put out, if any, and the calls inside it."""

    name: str
    module: nn.Module
    shape: tuple[int, ...] | None = None  # of the features as `tap` gives them
    size: Size | None = None  # their (h, w); None for 1×1 too
    depth: int = 0  # layers with weights that had been run by its end
    inside: list[Call] = field(default_factory=list)

    def descendants(self) -> Iterator[Call]:
        for call in self.inside:
            yield call
            yield from call.descendants()

    @property
    def weighted(self) -> bool:
        """Whether this layer itself mixes channels or positions by learned weights: a convolution, a linear layer, …

        A container that holds a position embedding does not, nor does one factor a channel.
        """
        if isinstance(self.module, (nn.modules.conv._ConvNd, nn.Linear)):
            return True
        if self.inside or isinstance(self.module, NORMS):
            return False
        return any(sum(n > 1 for n in p.shape) >= 2 for p in self.module.parameters(recurse=False))


def trace(model: nn.Module, example: Tensor) -> Call:
    """Runs the model once in eval mode; the root of the tree is the model itself."""
    root = Call("", model)
    stack = [root]
    run = 0
    image, batch = (example.shape[-2], example.shape[-1]), example.shape[0]
    handles = []
    for name, module in model.named_modules():
        if name == "":
            continue

        def enter(m: nn.Module, args: Any, name: str = name) -> None:
            call = Call(name, m)
            stack[-1].inside.append(call)
            stack.append(call)

        def leave(m: nn.Module, args: Any, output: Any) -> None:
            nonlocal run
            call = stack.pop()
            run += call.weighted
            call.depth = run
            call.shape, call.size = _features(model, call.name, output, image, batch)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with evaluating(model):
            call_uncompiled(model, example)
    except AssertionError as error:  # of networks that take one image size
        raise UserError(
            f"{type(model).__name__} does not take images {tuple(example.shape)}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return root


def _features(
    model: nn.Module, name: str, output: Any, image: Size, batch: int
) -> tuple[tuple[int, ...] | None, Size | None]:
    """Shape and grid of the features in what a layer put out; (None, None) where there are none, or several."""
    if output is None or (isinstance(output, Tensor) and output.ndim not in (3, 4)):
        return None, None
    hints = read_hints(model, name)
    try:
        found = feature_map(output, name, image, batch, hints)
    except UserError:
        return None, None
    # Windows, or heads folded into the batch, are no map of an image.
    if found.shape[0] != batch or not found.is_floating_point():
        return None, None
    layout = find_layout(tuple(found.shape), image, hints)
    if layout is None:
        return None, None
    return layout.shape(tuple(found.shape)), None if layout.grid == (1, 1) else layout.grid
