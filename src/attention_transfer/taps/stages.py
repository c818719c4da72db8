"""The stages of a network: the last layer at each resolution."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..arguments import check_images, check_module
from ..errors import UserError
from .capture import split_preprocessing
from .layout import Size
from .trace import NORMS, Call, trace

# A drop leaves at most 2/3 of the positions along each axis (3 -> 2). Convolutions without padding
# take off less (149 -> 147 in Inception) and stay at their resolution.
DROP = math.sqrt(2)
ELEMENTWISE = (
    *NORMS,
    *(nn.Identity, nn.modules.dropout._DropoutNd, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU),
    *(nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Sigmoid, nn.Tanh),
)


@dataclass(frozen=True)
class Stage:
    """A layer to tap: its dotted name, and the shape of its features for the example.

    The shape is (N, C, H, W), or (N, L, D) for tokens on a square grid. `stride` is from the
    network's own input; `depth` is the number of layers with weights that run before its end.
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
    """The stages of a network, input to output, found by one run on `example` (N, C, H, W).

    timm's models list theirs in `feature_info`; in others, the calls show the last layer at each
    resolution. A vision transformer has one resolution, and so one stage: its last block.

    Raises:
        UserError: if no module of the network returns feature maps larger than 1×1.
    """
    check_module(model, "model")
    check_images(example, "example", model)
    if example.ndim != 4:
        raise UserError(f"example is {tuple(example.shape)}: expected images (N, C, H, W)")
    model, preprocess = split_preprocessing(model)
    if preprocess is not None:
        example = preprocess(example)
    root = trace(model, example)
    image = (example.shape[-2], example.shape[-1])
    traced = _last_at_each_size(root, image)
    calls = _from_feature_info(model, root, traced) or list(traced.values())
    candidates = []
    for call in _without_pooling_only(root, calls):
        assert call.size is not None
        stride = math.sqrt(math.prod(image) / math.prod(call.size))
        candidates.append(Stage(call.name, call.shape, stride, call.depth))
    if not candidates:
        raise UserError(
            f"no stage in {type(model).__name__}: none of its modules returns a feature map, "
            "(N, C, H, W) or tokens (N, L, D), larger than 1×1"
        )
    return _last_before_each_drop(candidates)


def try_stages(model: nn.Module, example: Tensor) -> list[Stage]:
    """As `stages`; empty if the network has no feature maps, or does not take the example."""
    try:
        return stages(model, example)
    except UserError:
        return []


def _last_before_each_drop(candidates: Sequence[Stage]) -> list[Stage]:
    """The last stage of those whose strides differ by less than a drop."""
    kept: list[Stage] = []
    for stage in sorted(candidates, key=lambda stage: stage.stride):
        if not kept or stage.stride >= DROP * kept[-1].stride:
            kept.append(stage)
        elif stage.depth >= kept[-1].depth:
            kept[-1] = stage
    return kept


def _without_pooling_only(root: Call, calls: list[Call]) -> list[Call]:
    """Leaves out resolutions at which no layer with weights has worked yet.

    VGG's last pooling returns a resolution of its own, but nothing works at it.
    """
    first_depth: dict[Size | None, int] = {}
    for call in root.descendants():
        if call.size is not None and call.has_weights:
            first_depth.setdefault(call.size, call.depth)
    if not first_depth:
        return calls
    kept = []
    for call in calls:
        worked = first_depth.get(call.size, math.inf) <= call.depth
        # NesT's layers work on windows, never on a grid of the image's: the layers inside count.
        if worked or any(inner.has_weights for inner in call.descendants()):
            kept.append(call)
    return kept


def _from_feature_info(model: nn.Module, root: Call, traced: dict[Size | None, Call]) -> list[Call]:
    """The calls that timm's `feature_info` lists, the last at each size; empty if not usable."""
    info: Any = getattr(model, "feature_info", None)
    modules = dict(model.named_modules())
    last: dict[Size | None, Call] = {}
    try:
        for layer in [entry["module"] for entry in info]:
            module = modules.get(layer)
            if isinstance(module, nn.ModuleList) and len(module):
                layer = f"{layer}.{len(module) - 1}"  # the list itself is never called
            (call,) = (call for call in root.descendants() if call.name == layer)
            if not call.shape:
                return []
            last[call.size] = call
    except (TypeError, KeyError, ValueError):  # no such list, or not one call of a layer
        return []
    last.pop(None, None)
    for size, call in last.items():
        # DenseNet lists `norm5` last, which is part of what comes next; the stage ends before it.
        peer = traced.get(size, call)
        if isinstance(call.module, ELEMENTWISE) and peer.depth <= call.depth:
            last[size] = peer
    return list(last.values())


def _last_at_each_size(root: Call, size: Size) -> dict[Size | None, Call]:
    last: dict[Size | None, Call] = {}
    times_called = Counter(call.name for call in root.descendants())
    for call in _units(root, size, seen=set()):
        if times_called[call.name] > 1:
            continue  # one ReLU or pooling for the whole network: a tap cannot tell its calls apart
        before = last.get(call.size)
        # BN-ReLU after a block is a pre-activation, part of what comes next: WRN's `bn` after
        # `group2`. After a bare convolution, it is the end of conv-BN-ReLU.
        is_preactivation = (
            before is not None
            and before.children
            and call.depth == before.depth
            and not _ends_in_weights(before)
        )
        if not is_preactivation:
            last[call.size] = call
    return last


def _ends_in_weights(call: Call) -> bool:
    """Whether a chain of layers ends in one with weights."""
    while isinstance(call.module, nn.Sequential) and call.children:
        call = call.children[-1]
    return not call.children and call.has_weights


def _units(call: Call, size: Size, seen: set[Size | None]) -> Iterator[Call]:
    """The calls inside `call`, in order, as units of one resolution each.

    A container of several resolutions, such as a backbone, is opened. `size` is the resolution
    before the call, `seen` are those of all units before it.
    """
    for child in call.children:
        units = list(_units(child, size, set(seen)))
        if child.size is not None and (not child.children or _is_unit(child, units, size, seen)):
            units = [child]
        yield from units
        seen.update(unit.size for unit in units)
        for last in (*units, child):
            size = last.size or size


def _is_unit(call: Call, inner: Sequence[Call], size: Size, seen: set[Size | None]) -> bool:
    """Whether a container that is fed maps of `size` has one resolution, that of its output."""
    if _ends_in_norm(call):
        return False
    if call.size == size:
        return True  # an hourglass lowers the resolution inside and restores it
    # ResNet's `layer2` lowers the resolution once and goes on at the lower one: one unit. Its first
    # convolution may still work at `size`, of which `layer1` has been the last feature map. If
    # nothing came before at `size`, as in a backbone, the last one at `size` is inside.
    others = {unit.size for unit in inner} - {size, call.size, *seen}
    if others or (size not in seen and any(unit.size == size for unit in inner)):
        return False
    # NIN's blocks end in their pooling: the last feature map before it is inside.
    works = any(unit.size == call.size and unit.has_weights for unit in call.descendants())
    return works and not _lowers_at_end(call, size)


def _lowers_at_end(call: Call, size: Size) -> bool:
    """Whether blocks at the resolution `size` come first, and only the last layer lowers it.

    As in Sequential(block, block, Conv2d(stride=2)): the second block ends a stage. No such case is
    a residual block whose last convolution lowers, for only bare layers come before that.
    """
    working = []
    for child in call.children:
        if child.size is None:
            continue
        if child.has_weights or any(inner.has_weights for inner in child.descendants()):
            working.append(child)
    if len(working) < 2 or any(child.size != size for child in working[:-1]):
        return False
    return any(child.children for child in working[:-1])


def _ends_in_norm(call: Call) -> bool:
    """Whether this is a sequence of equal blocks with a norm behind it.

    As the encoder of torchvision's vision transformer, whose last block is the stage, not the norm.
    """
    if len(call.children) < 2 or not isinstance(call.children[-1].module, NORMS):
        return False
    blocks = call.children[-2]
    if not isinstance(blocks.module, nn.Sequential) or not blocks.children:
        return False
    types = {type(block.module) for block in blocks.children}
    return len(types) == 1 and bool(blocks.children[0].children)
