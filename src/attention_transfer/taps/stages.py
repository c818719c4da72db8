"""The stages of a network: the last layer at each resolution."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from .capture import unwrap
from .layout import Size
from .trace import ELEMENTWISE, NORMS, Call, trace

# Where a resolution drops, a map has at most 2/3 of the positions along each axis (3 -> 2); what takes less off is a
# convolution without padding (149 -> 147), and the resolution the same.
DROP = math.sqrt(2)


@dataclass(frozen=True)
class Stage:
    """A layer to tap: its dotted name in the network, and the shape of its features for the example, as `tap` gives
    them: (N, C, H, W), or (N, L, D) for tokens on a square grid.

    `stride` is from the network's own input; `depth` the number of layers with weights that lie before the layer's end.
    """

    name: str
    shape: tuple[int, ...]
    stride: float = field(default=1.0, compare=False)
    depth: int = field(default=0, compare=False)

    @property
    def channels(self) -> int:
        return self.shape[1] if len(self.shape) == 4 else self.shape[2]

    @property
    def size(self) -> Size:
        """(H, W), of tokens too."""
        if len(self.shape) == 4:
            return self.shape[2], self.shape[3]
        side = math.isqrt(self.shape[1])
        return side, side


def stages(model: nn.Module, example: Tensor) -> list[Stage]:
    """The stages of a network, input to output, found by running it once on `example` (N, C, H, W).

    timm models say theirs in `feature_info`; of others the last layer at each resolution is looked for. A vision
    transformer has one resolution, and so one stage: its last block. Where nothing but a pooling puts out a resolution
    (after VGG's last convolution) there is no stage: no layer has worked there.

    Raises:
        UserError: where no module of the network puts out feature maps larger than 1×1.
    """
    model = unwrap(model)
    root = trace(model, example)
    size = (example.shape[-2], example.shape[-1])
    traced = _last_at_each_size(root, size)
    found = _worked_out(root, _feature_info(model, root, traced) or list(traced.values()))
    if not found:
        raise UserError(
            f"no stage in {type(model).__name__}: none of its modules puts out a feature map, (N, C, H, W) or tokens "
            "(N, L, D), larger than 1×1"
        )
    return _drops([_stage(c, size) for c in found])


def try_stages(model: nn.Module, example: Tensor) -> list[Stage]:
    """As `stages`; none where the network has no feature maps, or does not take the example."""
    try:
        return stages(model, example)
    except UserError:
        return []


def _stage(call: Call, image: Size) -> Stage:
    assert call.shape is not None
    assert call.size is not None
    return Stage(
        call.name, call.shape, math.sqrt(math.prod(image) / math.prod(call.size)), call.depth
    )


def _drops(found: Sequence[Stage]) -> list[Stage]:
    """The last stage before each drop, input to output."""
    kept: list[Stage] = []
    for stage in sorted(found, key=lambda s: s.stride):
        if kept and stage.stride < DROP * kept[-1].stride:
            before = kept.pop()
            stage = max(stage, before, key=lambda s: s.depth)
        kept.append(stage)
    return kept


def _worked_out(root: Call, found: list[Call]) -> list[Call]:
    """Without those whose resolution only a pooling has made: no layer with weights put it out until there."""
    first: dict[Size | None, int] = {}
    for call in root.descendants():
        if call.size is not None and call.weighted:
            first[call.size] = min(call.depth, first.get(call.size, call.depth))
    if not first:
        return found
    # Windows are worked on at no size of the image's: then the layers inside count.
    return [
        c
        for c in found
        if first.get(c.size, math.inf) <= c.depth or any(d.weighted for d in c.descendants())
    ]


def _feature_info(model: nn.Module, root: Call, traced: dict[Size, Call]) -> list[Call]:
    """The calls of the layers that timm's `feature_info` names, the last at each size; none where one is not usable."""
    info: Any = getattr(model, "feature_info", None)
    try:
        layers = [_called(model, entry["module"]) for entry in info]
    except (TypeError, KeyError, AttributeError):
        return []
    calls: dict[str, list[Call]] = {}
    for call in root.descendants():
        calls.setdefault(call.name, []).append(call)
    if any(len(calls.get(layer, ())) != 1 for layer in layers):
        return []
    named = [calls[layer][0] for layer in layers]
    if any(c.shape is None for c in named):
        return []
    last = {c.size: c for c in named if c.size is not None}
    # It sometimes names the BN-ReLU of a pre-activation, which is part of what comes next.
    return [_before(c, traced) if isinstance(c.module, ELEMENTWISE) else c for c in last.values()]


def _before(call: Call, traced: dict[Size, Call]) -> Call:
    """The traced call at this size, if it is not a later one."""
    assert call.size is not None
    found = traced.get(call.size, call)
    return found if found.depth <= call.depth else call


def _called(model: nn.Module, layer: str) -> str:
    """The layer; of a list of layers, which is never called itself, the last one."""
    module = model.get_submodule(layer)
    return (
        f"{layer}.{len(module) - 1}" if isinstance(module, nn.ModuleList) and len(module) else layer
    )


def _last_at_each_size(root: Call, size: Size) -> dict[Size, Call]:
    last: dict[Size, Call] = {}
    calls = Counter(c.name for c in root.descendants())
    for call in _flatten(root, size, seen=set()):
        if calls[call.name] > 1:
            continue  # one ReLU or pool for the whole network: which call to read could not be said
        assert call.size is not None
        before = last.get(call.size)
        if (
            before is not None
            and before.inside
            and call.depth == before.depth
            and not _ends_bare(before)
        ):
            continue  # BN-ReLU after a block: a pre-activation, part of what comes next
        last[call.size] = call
    return last


def _ends_bare(call: Call) -> bool:
    """Whether a chain of layers ends in one with weights: the BN-ReLU after it is its own."""
    while isinstance(call.module, nn.Sequential) and call.inside:
        call = call.inside[-1]
    return not call.inside and call.weighted


def _flatten(call: Call, size: Size, seen: set[Size]) -> Iterator[Call]:
    """The calls inside `call` as units at one resolution each; a container that spans several is opened."""
    for child in call.inside:
        inner = list(_flatten(child, size, set(seen)))
        if child.size is None:
            units = inner
        else:
            units = [child] if not child.inside or _is_unit(child, inner, size, seen) else inner
        yield from units
        for unit in units:
            assert unit.size is not None
            size = unit.size
            seen.add(size)
        if child.size is not None:
            size = child.size


def _is_unit(call: Call, inner: Sequence[Call], size: Size, seen: set[Size]) -> bool:
    """Whether a container is of one resolution.

    One that lowers the resolution once and goes on working at the lower one (a residual stage) is a unit of the lower
    resolution, whatever it did before. One that only pools at its end, or lowers it with its last layer, is not: the
    last feature map before the drop is inside it. Nor is one that ends in the norm of its blocks.
    """
    if _ends_in_a_norm(call):
        return False
    if call.size == size:
        return True  # what goes on inside at other sizes comes back
    others = {c.size for c in inner} - {size, call.size, *seen}
    starts_lower = size in seen or all(c.size != size for c in inner)
    works = any(c.size == call.size and c.weighted for c in call.descendants())
    return not others and starts_lower and works and not _lowers_at_its_end(call, size)


def _lowers_at_its_end(call: Call, size: Size) -> bool:
    """Whether blocks at the resolution `size` come first, and only the last layer with weights lowers it."""
    working = [
        c
        for c in call.inside
        if c.size is not None and any(d.weighted for d in (c, *c.descendants()))
    ]
    if len(working) < 2 or any(c.size != size for c in working[:-1]):
        return False
    return any(c.inside for c in working[:-1])


def _ends_in_a_norm(call: Call) -> bool:
    """Whether this is a sequence of blocks and a norm after it, as a vision transformer's encoder is."""
    if len(call.inside) < 2 or not isinstance(call.inside[-1].module, NORMS):
        return False
    blocks = call.inside[-2]
    kinds = {type(c.module) for c in blocks.inside}
    return (
        isinstance(blocks.module, nn.Sequential)
        and len(kinds) == 1
        and bool(blocks.inside[0].inside)
    )
