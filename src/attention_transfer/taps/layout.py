"""The order of axes in the output of a layer: (N, C, H, W), channels last, or tokens.

The positions of a feature map form a grid with the proportions of the image. These proportions and
attributes of the network show which axes are positions and which are channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import UserError

Size = tuple[int, int]
# The most prefix tokens (class token, DeiT's distillation token, registers) that are assumed for a
# network that does not state their number.
MAX_PREFIX = 8


@dataclass(frozen=True)
class Layout:
    """`axes` is NCHW, NHWC or NLC (tokens); `prefix` tokens precede those of the grid (h, w)."""

    axes: str
    grid: Size
    prefix: int = 0

    def features(self, output: Tensor) -> Tensor:
        """A view: (N, C, h, w), or (N, L, D) for tokens on a square grid."""
        if self.axes == "NHWC":
            return output.permute(0, 3, 1, 2)
        if self.axes == "NCHW":
            return output
        tokens = output[:, self.prefix :] if self.prefix else output
        if self.grid[0] == self.grid[1]:
            return tokens
        # Only a square grid follows from the number of tokens.
        return tokens.transpose(1, 2).unflatten(2, self.grid)


@dataclass(frozen=True)
class Hints:
    """The attributes of a network that describe one of its layers; None if it has none."""

    module: nn.Module
    prefix: int | None
    patch: Size | None
    axes: str | None  # NCHW, NHWC or NLC
    reorder: Callable[[Tensor], Tensor] | None  # shuffled tokens -> (N, h, w, D)

    @property
    def channels_last(self) -> bool:
        """Whether an output with C = h = w, whose shape is ambiguous, has its channels last.

        timm's networks state it. In torchvision's, the last `Permute` decides. Otherwise a layer
        with convolutions returns channels first, even if linear layers inside it take channels last
        (ConvNeXt, DaViT, EdgeNeXt, PVTv2); a layer with linear layers only returns channels last.
        """
        if self.axes is not None:
            return self.axes == "NHWC"
        modules = list(self.module.modules())
        permutes = [inner for inner in modules if type(inner).__name__ == "Permute"]
        if permutes:
            return tuple(getattr(permutes[-1], "dims", ())) == (0, 2, 3, 1)
        channels_first = nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase
        if any(isinstance(inner, channels_first) for inner in modules):
            return False
        return any(type(inner) in (nn.Linear, nn.LayerNorm) for inner in modules)


def read_hints(model: nn.Module, layer: str) -> Hints:
    """The hints of the layer, or of the innermost module around it that has them."""
    path = [model]
    for name in filter(None, layer.split(".")):  # the model itself is the layer ""
        path.append(getattr(path[-1], name))

    def innermost(read: Callable[[nn.Module], Any]) -> Any:
        values = map(read, reversed(path))
        return next((value for value in values if value is not None), None)

    prefix, patch, axes = map(innermost, (_prefix_tokens, _patch_size, _output_axes))
    return Hints(path[-1], prefix, patch, axes, _reorder_tokens(path, layer))


def _prefix_tokens(module: nn.Module) -> int | None:
    number = getattr(module, "num_prefix_tokens", None)  # timm's
    if isinstance(number, int):
        return number
    if isinstance(getattr(module, "class_token", None), nn.Parameter):  # torchvision's
        return 1
    return None


def _patch_size(module: nn.Module) -> Size | None:
    embedding = getattr(module, "patch_embed", module)  # timm; in torchvision the model itself
    size = getattr(embedding, "patch_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(n, int) for n in size):
        return size[0], size[1]
    return None


def _output_axes(module: nn.Module) -> str | None:
    form = getattr(module, "output_fmt", None)  # timm's: an enum or a string
    if form is None:
        return None
    return str(getattr(form, "value", form)).upper()


def _reorder_tokens(path: list[nn.Module], layer: str) -> Callable[[Tensor], Tensor] | None:
    """timm's Hiera orders its tokens by windows; its `reroll` restores the order for a block."""
    block = re.search(r"(?:^|\.)blocks\.(\d+)$", layer)
    # The path ends with the network, its list `blocks` and the block.
    if block is None or not hasattr(path[-3], "reroll"):
        return None
    reroll: Any = path[-3].reroll
    return partial(reroll, block_idx=int(block[1]))


def find_layout(shape: Sequence[int], image: Size | None, hints: Hints) -> Layout | None:
    """The layout of an output of this shape for images (H, W); None if it is not a feature map."""
    if len(shape) == 4:
        middle, last = (shape[1], shape[2]), (shape[2], shape[3])
        # Swin's (N, h, w, C): the middle axes have the image's proportions. If the last two have
        # them as well, as in (N, 24, 24, 24), the layers decide.
        if image is None or not _fits(middle, image):
            return Layout("NCHW", last)
        if _fits(last, image) and not hints.channels_last:
            return Layout("NCHW", last)
        return Layout("NHWC", middle)
    if len(shape) == 3 and image is not None:
        return _token_layout(shape[1], image, hints)
    return None


def _fits(grid: Size, image: Size) -> bool:
    """Whether a grid has the image's proportions, up to rounding and convolutions without padding.

    With stride s, h = H/s + a and w = W/s + b, so that h·W − w·H = a·W − b·H. Rounding makes a and
    b differ by up to 1, missing padding makes both −2 at most.
    """
    (h, w), (height, width) = grid, image
    if not (1 <= h <= height + 2 and 1 <= w <= width + 2):
        return False
    return abs(h * width - w * height) <= 2 * abs(width - height) + max(width, height)


def _token_layout(length: int, image: Size, hints: Hints) -> Layout | None:
    """The layout of `length` tokens: prefix tokens, then a grid in rows."""
    if hints.patch is not None:
        (height, width), (p, q) = image, hints.patch
        whole = height // p, width // q
        padded = -(-height // p), -(-width // q)  # some networks pad the image to whole patches
        for grid in (whole, padded):
            prefix = length - math.prod(grid)
            if 0 <= prefix <= max(MAX_PREFIX, hints.prefix or 0) and prefix < length:
                return Layout("NLC", grid, prefix)
    stated = () if hints.prefix is None else (hints.prefix,)
    # An integer stride that is equal in both directions is strong evidence: 64 + 5 tokens of a
    # 32×32 image are 5 prefix tokens and 8×8. Without one (PiT: 27×27 + 1 of 224×224), there is at
    # most a class token.
    for whole_stride, max_prefix in ((True, MAX_PREFIX), (False, 1)):
        for prefix in (*stated, *range(max_prefix + 1)):
            token_grid = _token_grid(length - prefix, image, whole_stride)
            if token_grid is not None:
                return Layout("NLC", token_grid, prefix)
    return None


def _token_grid(positions: int, image: Size, whole_stride: bool) -> Size | None:
    """(h, w) with h·w = `positions`, in the image's proportions."""
    if positions < 1:
        return None
    height, width = image
    below = int(math.sqrt(positions * height / width))  # h, rounded down
    for h in (below, below + 1):
        if h < 1 or positions % h:
            continue
        w = positions // h
        stride = height // h
        if (height, width) == (stride * h, stride * w):
            return h, w
        # Otherwise one stride s may give both sides, rounded up or down: H/(h+1) < s < H/(h−1).
        low = max(height / (h + 1), width / (w + 1))
        fits = h <= height and w <= width and low * (h - 1) < height and low * (w - 1) < width
        if fits and not whole_stride:
            return h, w
    return None


def feature_map(
    output: Any, layer: str, image: Size | None, batch: int | None, hints: Hints
) -> Tensor:
    """The tensor that a layer returns, or the only feature map in its tuple or dict.

    Raises:
        UserError: if there is none, or several.
    """
    if isinstance(output, Tensor):
        if hints.reorder is not None and output.ndim == 3:
            return hints.reorder(output)
        return output
    tensors = dict(_tensors(output))
    maps: list[Tensor] = []
    for tensor in tensors.values():
        repeated = any(tensor is other for other in maps)
        if not repeated and _is_feature_map(tensor, image, batch, hints):
            maps.append(tensor)
    if len(maps) == 1:
        return maps[0]
    kind = type(output).__name__
    if not tensors:
        raise UserError(
            f"layer {layer!r} returns a {kind} without tensors: "
            "expected a tensor, or one feature map"
        )
    shapes = ", ".join(f"{place} {tuple(t.shape)}" for place, t in tensors.items())
    raise UserError(
        f"layer {layer!r} returns a {kind} with {len(maps) or 'no'} "
        f"feature map{'s' * (len(maps) != 1)} ({shapes}): "
        "expected one; tap a layer inside it that returns one"
    )


def is_per_image(tensor: Tensor, batch: int | None) -> bool:
    """Whether the tensor may hold one value per image: Swin folds windows into the batch."""
    return tensor.is_floating_point() and (batch is None or tensor.shape[:1] == (batch,))


def _is_feature_map(tensor: Tensor, image: Size | None, batch: int | None, hints: Hints) -> bool:
    if not is_per_image(tensor, batch):
        return False
    layout = find_layout(tensor.shape, image, hints)
    if layout is None or layout.grid == (1, 1):
        return False
    return image is None or _fits(layout.grid, image)


def _tensors(output: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Each tensor in nested tuples, lists and dicts, with its place: `[1]`, `['x'][0]`."""
    if isinstance(output, Tensor):
        yield place, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _tensors(value, f"{place}[{key!r}]")
    elif isinstance(output, (tuple, list)):
        for i, value in enumerate(output):
            yield from _tensors(value, f"{place}[{i}]")
