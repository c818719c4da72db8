"""The residual networks of the authors' ImageNet script, with the names of its files.

Basic blocks with the ReLU after the sum; a 7×7 stem of stride 2 and a 3×3 max pool of stride 2;
groups 0 to 3, of which 1 to 3 halve the size. Attention is read at the children `group0` to
`group3`. In the teachers, batch normalisation is folded into biased convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def _convolution(inputs: int, outputs: int, kernel: int, stride: int, folded: bool) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=folded)


def _normalisation(channels: int, folded: bool) -> nn.Module:
    return nn.Identity() if folded else nn.BatchNorm2d(channels)


class Block(nn.Module):
    """conv-BN-ReLU-conv-BN, plus the shortcut of the input, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int, folded: bool):
        super().__init__()
        self.conv0 = _convolution(inputs, outputs, 3, stride, folded)
        self.bn0 = _normalisation(outputs, folded)
        self.conv1 = _convolution(outputs, outputs, 3, 1, folded)
        self.bn1 = _normalisation(outputs, folded)
        self.convdim = None
        if inputs != outputs or stride != 1:
            self.convdim = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(F.relu(self.bn0(self.conv0(x)))))
        shortcut = x if self.convdim is None else self.convdim(x)
        return F.relu(y + shortcut)


class AuthorsResNet(nn.Module):
    """Images (N, 3, H, W) -> logits (N, num_classes).

    Args:
        blocks: the number of blocks of each of the four groups.
        stem: the channels of the first convolution.
        widths: the channels of each group.
        num_classes: the number of classes.
        folded: whether batch normalisation is folded into the convolutions.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        stem: int,
        widths: Sequence[int],
        num_classes: int,
        folded: bool,
    ):
        super().__init__()
        self.conv0 = _convolution(3, stem, 7, 2, folded)
        self.bn0 = _normalisation(stem, folded)
        inputs = stem
        for g, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            group = nn.Sequential()
            for b in range(count):
                stride = 2 if g > 0 and b == 0 else 1
                group.add_module(f"block{b}", Block(inputs, width, stride, folded))
                inputs = width
            self.add_module(f"group{g}", group)
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn0(self.conv0(x))), 3, 2, 1)
        for g in range(4):
            x = self.get_submodule(f"group{g}")(x)
        return self.fc(x.mean((2, 3)))
