"""How features lie in what a layer puts out: (N, C, H, W), channels last, or tokens behind prefix tokens.

A feature map's positions are a grid in the proportions of the image; that, and what the network says of itself, tells
its axes apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import UserError

Size = tuple[int, int]
PREFIX = 8  # prefix tokens that are looked for where the network does not say how many it has


@dataclass(frozen=True)
class Layout:
    """`kind` is NCHW, NHWC or NLC (tokens); `grid` the positions (h, w); `prefix` the tokens before them."""

    kind: str
    grid: Size
    prefix: int = 0

    def features(self, output: Tensor) -> Tensor:
        """(N, C, h, w), or (N, L, D) for tokens on a square grid: a view."""
        if self.kind == "NHWC":
            return output.permute(0, 3, 1, 2)
        if self.kind == "NLC":
            tokens = output[:, self.prefix :] if self.prefix else output
            # The number of tokens gives a square grid away, another one it does not.
            return (
                tokens
                if self.grid[0] == self.grid[1]
                else tokens.transpose(1, 2).unflatten(2, self.grid)
            )
        return output

    def shape(self, output: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of `features` for an output of this shape."""
        channels = output[1] if self.kind == "NCHW" else output[-1]
        if self.kind == "NLC" and self.grid[0] == self.grid[1]:
            return (output[0], math.prod(self.grid), channels)
        return (output[0], channels, *self.grid)


@dataclass(frozen=True)
class Hints:
    """What a network says of itself at one of its layers; None where it says nothing."""

    module: nn.Module
    prefix: int | None = None
    patch: Size | None = None
    form: str | None = None  # NCHW, NHWC or NLC
    in_order: Callable[[Tensor], Tensor] | None = (
        None  # from tokens that the network has shuffled to (N, h, w, D)
    )

    @property
    def channels_last(self) -> bool:
        """For outputs of C = h = w, whose shape does not tell."""
        return _works_channels_last(self.module) if self.form is None else self.form == "NHWC"


def read_hints(model: nn.Module, layer: str) -> Hints:
    """timm's `num_prefix_tokens`, `patch_embed` and `output_fmt`, torchvision's `class_token` and `patch_size`."""
    path, names = [model], layer.split(".") if layer else []
    for name in names:
        path.append(getattr(path[-1], name))
    prefix = patch = form = None
    for module in reversed(path):
        prefix = _prefix_tokens(module) if prefix is None else prefix
        patch = _patch(module) if patch is None else patch
        form = getattr(module, "output_fmt", None) if form is None else form
    form = None if form is None else str(getattr(form, "value", form)).upper()
    return Hints(path[-1], prefix, patch, form, _in_order(path, names))


def find_layout(shape: tuple[int, ...], image: Size | None, hints: Hints) -> Layout | None:
    """The layout of an output of this shape for images (H, W); None where it is no map of positions."""
    if len(shape) == 4:
        inner, last = (shape[1], shape[2]), (shape[2], shape[3])
        if (
            image is not None
            and _fits(inner, image)
            and (not _fits(last, image) or hints.channels_last)
        ):
            return Layout("NHWC", inner)
        return Layout("NCHW", last)
    if len(shape) == 3 and image is not None:
        return _token_layout(shape[1], image, hints)
    return None


def feature_map(
    output: Any, layer: str, image: Size | None, batch: int | None, hints: Hints
) -> Tensor:
    """The tensor that a layer puts out, or the one feature map in the tuple or dict that it puts out.

    Raises:
        UserError: where there is none, or several.
    """
    if isinstance(output, Tensor):
        return output if hints.in_order is None or output.ndim != 3 else hints.in_order(output)
    found = dict(_tensors(output))
    maps: dict[str, Tensor] = {}
    for place, t in found.items():
        if _is_map(t, image, batch, hints) and not any(t is other for other in maps.values()):
            maps[place] = t
    if len(maps) == 1:
        return next(iter(maps.values()))
    kind = type(output).__name__
    if not found:
        raise UserError(
            f"layer {layer!r} puts out a {kind} without tensors: expected a tensor, or one feature map"
        )
    listed = ", ".join(f"{place} {tuple(t.shape)}" for place, t in found.items())
    raise UserError(
        f"layer {layer!r} puts out a {kind} with {len(maps) or 'no'} feature map{'s' * (len(maps) != 1)} ({listed}): "
        "expected one; tap a layer inside it that puts out one"
    )


def _is_map(t: Tensor, image: Size | None, batch: int | None, hints: Hints) -> bool:
    if (
        not t.is_floating_point()
        or t.ndim not in (3, 4)
        or (batch is not None and t.shape[0] != batch)
    ):
        return False
    layout = find_layout(tuple(t.shape), image, hints)
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


def _fits(grid: Size, image: Size) -> bool:
    """Whether a grid has the image's proportions: up to a position for rounding, and two that padding did not replace.

    h = H/s + a and w = W/s + b give h·W − w·H = a·W − b·H.
    """
    (h, w), (height, width) = grid, image
    if not (1 <= h <= height + 2 and 1 <= w <= width + 2):
        return False
    return abs(h * width - w * height) <= 2 * abs(width - height) + max(width, height)


def _token_layout(length: int, image: Size, hints: Hints) -> Layout | None:
    if hints.patch is not None:
        for up in (0, 1):
            height, width = (
                (n + up * (p - 1)) // p for n, p in zip(image, hints.patch, strict=True)
            )
            prefix = length - height * width
            if 0 <= prefix <= max(PREFIX, hints.prefix or 0) and prefix < length:
                return Layout("NLC", (height, width), prefix)
    known = () if hints.prefix is None else (hints.prefix,)
    # Where the stride is no whole number, the evidence is weak: nothing beyond a class token is looked for.
    for exact, most in ((True, PREFIX), (False, 1)):
        for prefix in (*known, *range(most + 1)):
            if (grid := _grid(length - prefix, image, exact)) is not None:
                return Layout("NLC", grid, prefix)
    return None


def _grid(positions: int, image: Size, exact: bool) -> Size | None:
    """The grid of so many positions in the image's proportions, `exact`: by a whole stride, the same both ways."""
    if positions < 1:
        return None
    height, width = image
    first = int(math.sqrt(positions * height / width))
    for h in (first, first + 1):
        if h < 1 or positions % h:
            continue
        w = positions // h
        if exact:
            if height % h == 0 and width % w == 0 and height // h == width // w:
                return h, w
        elif _one_stride((h, w), image):
            return h, w
    return None


def _one_stride(grid: Size, image: Size) -> bool:
    """Whether one stride, rounded up or down, leads to both sides: H/(h+1) < s < H/(h−1), and so for the width."""
    low = max(n / (k + 1) for n, k in zip(image, grid, strict=True))
    return all(k <= n and low * (k - 1) < n for n, k in zip(image, grid, strict=True))


def _prefix_tokens(module: nn.Module) -> int | None:
    known = getattr(module, "num_prefix_tokens", None)
    if isinstance(known, int):
        return known
    return (
        1 if isinstance(getattr(module, "class_token", None), nn.Parameter) else None
    )  # torchvision's


def _patch(module: nn.Module) -> Size | None:
    embedding = getattr(module, "patch_embed", module)
    size = getattr(embedding, "patch_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(n, int) for n in size):
        return size[0], size[1]
    return None


def _in_order(path: list[nn.Module], names: list[str]) -> Callable[[Tensor], Tensor] | None:
    """timm's Hiera keeps its tokens in an order of windows, and has a `reroll` back to rows for each block."""
    reroll = (
        getattr(path[-3], "reroll", None) if len(names) >= 2 and names[-2] == "blocks" else None
    )
    return None if reroll is None else partial(reroll, block_idx=int(names[-1]))


def _works_channels_last(module: nn.Module) -> bool:
    """Judged by the last layer inside whose output's axes are known."""
    last = False
    for inner in module.modules():
        if isinstance(inner, (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)):
            last = False
        elif type(inner) in (nn.Linear, nn.LayerNorm):
            last = True
        elif type(inner).__name__ == "Permute":  # torchvision's
            last = tuple(getattr(inner, "dims", ())) == (0, 2, 3, 1)
    return last and not any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()
    )
