"""The residual networks of the authors' ImageNet script, with the names of its files.

Basic blocks with the ReLU after the sum; a 7×7 stem of stride 2 and a 3×3 max pool of stride 2;
groups 0 to 3, of which 1 to 3 halve the size. Attention is read at the children `group0` to
`group3`. In the teachers, batch normalisation is folded into biased convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """conv-BN-ReLU-conv-BN, plus the shortcut of the input, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int, folded: bool):
        super().__init__()
        normalisation = nn.Identity if folded else nn.BatchNorm2d
        self.conv0 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=folded)
        self.bn0 = normalisation(outputs)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=folded)
        self.bn1 = normalisation(outputs)
        self.convdim = None
        if inputs != outputs or stride != 1:
            self.convdim = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(F.relu(self.bn0(self.conv0(x)))))
        shortcut = x if self.convdim is None else self.convdim(x)
        return F.relu(y + shortcut)


class AuthorsResNet(nn.Module):
    """Images (N, 3, H, W) -> logits (N, num_classes).

    `blocks` are the numbers of blocks of the groups, which have `width`, 2, 4 and 8 times `width`
    channels. With `folded`, there is no batch normalisation.
    """

    def __init__(self, blocks: Sequence[int], width: int, num_classes: int, folded: bool):
        super().__init__()
        self.conv0 = nn.Conv2d(3, width, 7, 2, 3, bias=folded)
        self.bn0 = nn.Identity() if folded else nn.BatchNorm2d(width)
        inputs, groups = width, []
        for g, stride in enumerate((1, 2, 2, 2)):
            group = nn.Sequential()
            for b in range(blocks[g]):
                group.add_module(f"block{b}", Block(inputs, 2**g * width, stride, folded))
                inputs, stride = 2**g * width, 1
            groups.append(group)
        self.group0, self.group1, self.group2, self.group3 = groups
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn0(self.conv0(x))), 3, 2, 1)
        x = self.group3(self.group2(self.group1(self.group0(x))))
        return self.fc(x.mean((2, 3)))
