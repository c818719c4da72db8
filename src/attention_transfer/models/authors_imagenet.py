"""The residual networks of the authors' ImageNet script, as its files name them.

Basic blocks, activated after the sum; a 7×7 stem of stride 2 and a 3×3 max pool of stride 2; groups 0 to 3, of which
1 to 3 halve the size; a 1×1 shortcut of the block's input where its name is in the file. The teacher's batch
normalisation is folded into biased convolutions. Attention is read at the children `group0` … `group3`.

Blocks are counted from the names: the script's ResNet-34 *student* has 3, 4, 6, 5 by mistake (it should be 3, 4, 6, 3).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError

KNOWN: dict[tuple[int, ...], str] = {(2, 2, 2, 2): "resnet-18", (3, 4, 6, 3): "resnet-34"}


def convolution(inputs: int, outputs: int, kernel: int, stride: int, folded: bool) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=folded)


def normalisation(channels: int, folded: bool) -> nn.Module:
    return nn.Identity() if folded else nn.BatchNorm2d(channels)


class Block(nn.Module):
    """conv-BN-ReLU-conv-BN, plus the shortcut of what came in, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int, folded: bool, shortcut: bool):
        super().__init__()
        self.conv0 = convolution(inputs, outputs, 3, stride, folded)
        self.bn0 = normalisation(outputs, folded)
        self.conv1 = convolution(outputs, outputs, 3, 1, folded)
        self.bn1 = normalisation(outputs, folded)
        self.convdim = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(F.relu(self.bn0(self.conv0(x)))))
        return F.relu(y + (x if self.convdim is None else self.convdim(x)))


class AuthorsResNet(nn.Module):
    """Images (N, 3, H, W) -> logits (N, num_classes), from the blocks and the width of each of the four groups."""

    def __init__(
        self,
        blocks: Sequence[int],
        stem: int,
        widths: Sequence[int],
        num_classes: int,
        folded: bool,
    ):
        super().__init__()
        self.conv0 = convolution(3, stem, 7, 2, folded)
        self.bn0 = normalisation(stem, folded)
        inputs = stem
        for g, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            group = nn.Sequential()
            for b in range(count):
                stride = 2 if g > 0 and b == 0 else 1
                group.add_module(
                    f"block{b}",
                    Block(inputs, width, stride, folded, inputs != width or stride != 1),
                )
                inputs = width
            self.add_module(f"group{g}", group)
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn0(self.conv0(x))), 3, 2, 1)
        for g in range(4):
            x = self.get_submodule(f"group{g}")(x)
        return self.fc(x.mean((2, 3)))


def resnet_of(params: Mapping[str, Tensor], classes: int, file: Path) -> tuple[AuthorsResNet, str]:
    """The network, still without its weights, that tensors of these names and shapes make, and its name.

    Raises:
        UserError: where a group or its first convolution is missing.
    """
    blocks, widths = group_shapes(params, 4, file)
    stem = _channels(params, "conv0.weight", file)
    name = KNOWN.get(tuple(blocks), f"resnet-{'-'.join(map(str, blocks))}")
    return AuthorsResNet(blocks, stem, widths, classes, folded="conv0.bias" in params), name


def group_shapes(
    params: Mapping[str, Tensor], groups: int, file: Path
) -> tuple[list[int], list[int]]:
    """How many blocks each group has, and how many channels."""
    found = [set[str]() for _ in range(groups)]
    for name in params:
        if (match := re.match(r"group(\d+)\.(block\d+)\.", name)) and int(match[1]) < groups:
            found[int(match[1])].add(match[2])
    widths = [_channels(params, f"group{g}.block0.conv0.weight", file) for g in range(groups)]
    return [len(blocks) for blocks in found], widths


def _channels(params: Mapping[str, Tensor], name: str, file: Path) -> int:
    weight = params.get(name)
    if weight is None or weight.ndim != 4 or not len(weight):
        what = "none" if weight is None else f"one of shape {tuple(weight.shape)}"
        raise UserError(
            f"{file}: a network of the authors' scripts has the convolution {name}, this file {what}"
        )
    return len(weight)
