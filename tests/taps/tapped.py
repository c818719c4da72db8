"""Small networks and batches that the tests of taps share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attention_transfer as at


def conv(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, inplace: bool = False
) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.ReLU(inplace))


class Small(nn.Module):
    """Two stages: `one` at full resolution, `two` at half."""

    def __init__(self, width: int = 4, inplace: bool = False):
        super().__init__()
        self.one = conv(3, width, inplace=inplace)
        self.two = conv(width, width, stride=2, inplace=inplace)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.two(self.one(x)).mean((2, 3)))


class Functional(nn.Module):
    """Writes over the output of `layer` with a function that no module announces."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu_(self.layer(x)).mean((2, 3)))


def images(size: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def names(model: nn.Module, size: int = 32) -> list[str]:
    return [s.name for s in at.stages(model, images(size))]


HEAD = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
