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

# The stride grows at least by this factor when the resolution drops: 3 -> 2 positions along an axis
# is a drop, 149 -> 147 (Inception's convolutions without padding) is not.
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
        """(H, W), also for tokens."""
        if len(self.shape) == 4:
            return self.shape[2], self.shape[3]
        side = math.isqrt(self.shape[1])
        return side, side


def stages(model: nn.Module, example: Tensor) -> list[Stage]:
    """The stages of a network, input to output, found by one run on `example` (N, C, H, W).

    timm's models list their stages in `feature_info`; for other networks the calls show the last
    layer at each resolution. A vision transformer has one resolution, so its last block is its only
    stage.

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
    """As `stages`; empty if the network has no feature maps, or fails on the example."""
    try:
        return stages(model, example)
    except UserError:
        return []


def _last_before_each_drop(candidates: Sequence[Stage]) -> list[Stage]:
    """The last stage among each group of stages whose strides differ by less than a drop."""
    kept: list[Stage] = []
    for stage in sorted(candidates, key=lambda stage: stage.stride):
        if not kept or stage.stride >= DROP * kept[-1].stride:
            kept.append(stage)
        elif stage.depth >= kept[-1].depth:
            kept[-1] = stage
    return kept


def _without_pooling_only(root: Call, calls: list[Call]) -> list[Call]:
    """Leaves out resolutions at which no layer with weights has run yet.

    For example, no layer of VGG runs at the resolution of its last pooling.
    """
    first_depth: dict[Size | None, int] = {}
    for call in root.descendants():
        if call.size is not None and call.has_weights:
            first_depth.setdefault(call.size, call.depth)
    if not first_depth:
        return calls
    kept = []
    for call in calls:
        has_run = first_depth.get(call.size, math.inf) <= call.depth
        # NesT's layers run on windows, not on the grid of the image, so inner layers count as well.
        if has_run or any(inner.has_weights for inner in call.descendants()):
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
    except (TypeError, KeyError, ValueError):  # no such list, or a layer without exactly one call
        return []
    last.pop(None, None)
    for size, call in last.items():
        # DenseNet lists `norm5` last, which belongs to the next stage; the stage ends before it.
        peer = traced.get(size, call)
        is_after_the_stage = isinstance(call.module, ELEMENTWISE) or _ends_in_norm(call)
        if is_after_the_stage and peer.depth <= call.depth:
            last[size] = peer
    return list(last.values())


def _last_at_each_size(root: Call, size: Size) -> dict[Size | None, Call]:
    last: dict[Size | None, Call] = {}
    times_called = Counter(call.name for call in root.descendants())
    for call in _units(root, size, seen=set()):
        if times_called[call.name] > 1:
            continue  # a tap cannot distinguish the calls of a ReLU or pooling that is shared
        before = last.get(call.size)
        if before is not None and normalises_positions(call.module):
            continue
        # BN-ReLU after a block is a pre-activation and belongs to the next stage, such as WRN's
        # `bn` after `group2`. After a single convolution, it is the end of conv-BN-ReLU.
        is_preactivation = (
            before is not None
            and before.children
            and call.depth == before.depth
            and not _ends_in_weights(before)
        )
        if not is_preactivation:
            last[call.size] = call
    return last


def normalises_positions(module: nn.Module) -> bool:
    """Whether a layer gives each position the same energy, so that its attention map is flat."""
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) == 1


def _ends_in_weights(call: Call) -> bool:
    """Whether a chain of layers ends in one with weights."""
    while isinstance(call.module, nn.Sequential) and call.children:
        call = call.children[-1]
    return not call.children and call.has_weights


def _units(call: Call, size: Size, seen: set[Size | None]) -> Iterator[Call]:
    """The calls inside `call`, in order, as units with one resolution each.

    A container with several resolutions, such as a backbone, is replaced by the calls inside it.
    `size` is the resolution before the call, `seen` are the resolutions of all units before it.
    """
    for child in call.children:
        # A copy of `seen`, because these units do not count if the child itself is one.
        units = list(_units(child, size, set(seen)))
        if child.size is not None and (not child.children or _is_unit(child, units, size, seen)):
            units = [child]
        yield from units
        seen.update(unit.size for unit in units)
        for last in (*units, child):
            size = last.size or size


def _is_unit(call: Call, inner: Sequence[Call], size: Size, seen: set[Size | None]) -> bool:
    """Whether a container whose input has `size` is one unit, with the resolution of its output."""
    if _ends_in_norm(call):
        return False
    if call.size == size:
        return True  # an hourglass lowers the resolution inside and restores it
    # ResNet's `layer2` lowers the resolution once and continues at the lower one: one unit. Its
    # first convolution may still run at `size`, whose last feature map is the output of `layer1`.
    # If no unit before has `size`, as in a backbone, the last feature map at `size` is inside.
    others = {unit.size for unit in inner} - {size, call.size, *seen}
    if others or (size not in seen and any(unit.size == size for unit in inner)):
        return False
    # NIN's blocks end in a pooling, so the last feature map before it is inside the block.
    has_layer = any(unit.size == call.size and unit.has_weights for unit in call.descendants())
    return has_layer and not _lowers_at_end(call, size)


def _lowers_at_end(call: Call, size: Size) -> bool:
    """Whether blocks at the resolution `size` come first, and only the last layer lowers it.

    In Sequential(block, block, Conv2d(stride=2)) the second block ends a stage. A residual block
    whose last convolution lowers the resolution has single layers before it, not blocks.
    """
    weighted = []
    for child in call.children:
        if child.size is None:
            continue
        if child.has_weights or any(inner.has_weights for inner in child.descendants()):
            weighted.append(child)
    if len(weighted) < 2 or any(child.size != size for child in weighted[:-1]):
        return False
    return any(child.children for child in weighted[:-1])


def _ends_in_norm(call: Call) -> bool:
    """Whether the call is a sequence of equal blocks followed by a norm.

    In the encoder of torchvision's vision transformer, and in the stages of PVTv2, the stage is the
    last block, not the norm.
    """
    if len(call.children) < 2 or not isinstance(call.children[-1].module, NORMS):
        return False
    *_, blocks, norm = call.children
    in_list = blocks.name.rpartition(".")[2].isdigit()  # PVTv2's stages call the blocks of a list
    if in_list and normalises_positions(norm.module):
        return bool(blocks.children) and blocks.size == call.size
    if not isinstance(blocks.module, nn.Sequential) or not blocks.children:
        return False
    types = {type(block.module) for block in blocks.children}
    return len(types) == 1 and bool(blocks.children[0].children)
