"""Wide residual networks for 32×32 images, WRN-d-k (Zagoruyko & Komodakis, BMVC 2016).

Pre-activation blocks; a 3×3 stem of 16 channels; groups of 16k, 32k, 64k channels with (d − 4)/6
blocks each; a 1×1 shortcut of the activated input if the width changes; BN, ReLU, global average
and linear layer at the end. Attention is read at the output of each group: at the children
`group0`, `group1`, `group2`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError

DEEPEST = 10_000
MOST_PARAMETERS = 10**9  # 4 GB; WRN-28-10 has 36.5 million


class Block(nn.Module):
    """BN-ReLU-conv twice, plus the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn0 = nn.BatchNorm2d(inputs)
        self.conv0 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.convdim = None
        if inputs != outputs:
            self.convdim = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn0(x))
        y = self.conv1(F.relu(self.bn1(self.conv0(active))))
        # The identity shortcut takes the block's input, the convolution the activated one.
        shortcut = x if self.convdim is None else self.convdim(active)
        return y + shortcut


class WideResNet(nn.Module):
    """WRN-depth-width: images (N, 3, H, W) -> logits (N, num_classes)."""

    def __init__(self, depth: int, width: int, num_classes: int):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            n = max(1, round((depth - 4) / 6))
            raise UserError(
                f"wrn-{depth}-{width}: the depth is {depth}, expected 6n + 4; "
                f"the nearest is wrn-{6 * n + 4}-{width}"
            )
        if width < 1:
            raise UserError(f"wrn-{depth}-{width}: the width is {width}, expected at least 1")
        _check_size(depth, width)
        self.conv0 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        inputs, groups = 16, []
        # The first block of a group has its stride: 32×32, 16×16, 8×8.
        for outputs, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            group = nn.Sequential()
            for b in range((depth - 4) // 6):
                group.add_module(f"block{b}", Block(inputs, outputs, stride))
                inputs, stride = outputs, 1
            groups.append(group)
        self.group0, self.group1, self.group2 = groups
        self.bn = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs, num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group2(self.group1(self.group0(self.conv0(x))))
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))


def _check_size(depth: int, width: int) -> None:
    """Raises `UserError` for a network that no machine can hold, such as wrn-1000000-1."""
    if depth > DEEPEST:
        raise UserError(f"wrn-{depth}-{width}: the depth is {depth}, expected at most {DEEPEST}")
    blocks = (depth - 4) // 6
    # Each block has two 3×3 convolutions with 16, 32 or 64 times the width as channels.
    parameters = blocks * 2 * 9 * (16**2 + 32**2 + 64**2) * width**2
    if parameters > MOST_PARAMETERS:
        raise UserError(
            f"wrn-{depth}-{width} has {parameters:.1e} parameters, expected at most "
            f"{MOST_PARAMETERS:.0e}: choose a smaller depth or width"
        )


def _initialise(module: nn.Module) -> None:
    # The authors' initialisation. Batch normalisation's weights at 1 would be better in short runs
    # (results/cifar10-maps.md).
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.uniform_(module.weight)
        nn.init.zeros_(module.bias)
