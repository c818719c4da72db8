"""Small networks, batches and tensors that the tests share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import attention_transfer as at
from attention_transfer.methods.base import Method
from attention_transfer.methods.registry import METHODS

CLASSES = 5


class Net(nn.Module):
    """Three stages and no batch statistics: samples do not depend on one another."""

    def __init__(self, width: int = 4, seed: int = 0, classes: int = CLASSES):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.one = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.ReLU(True))
            self.two = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(True))
            self.three = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(True))
            self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.three(self.two(self.one(x))).mean((2, 3)))


def batch(n: int = 4, size: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, size, size, generator=generator).to(dtype), torch.arange(n) % CLASSES


def make(
    *methods: Method,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
    **options: Any,
) -> at.Transfer:
    """A Transfer between two `Net`s, unless told otherwise; a teacher only where one is needed."""
    options.setdefault("example", batch()[0])
    student = Net() if student is None else student
    if teacher is None and any(getattr(method, "needs_teacher", True) for method in methods):
        teacher = Net(8, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(2)  # adapters
        return at.Transfer(student, teacher, list(methods), **options)


def make_all(**options: Any) -> at.Transfer:
    return make(*(cls() for cls in METHODS.values()), **options)


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], **tolerance)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def away(*shape: int, seed: int = 0) -> Tensor:
    """Signed, at least 0.3 from 0, no two magnitudes alike: no kink within a finite difference."""
    size = math.prod(shape)
    generator = torch.Generator().manual_seed(seed)
    magnitudes = 0.3 + torch.arange(size, dtype=torch.float64) / size
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    return (magnitudes * signs)[torch.randperm(size, generator=generator)].view(shape)


def derivative(loss: Tensor, of: Tensor, **options: bool) -> Tensor:
    return torch.autograd.grad(loss, of, **options)[0]


def close(a: Tensor, b: Tensor | np.ndarray, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b), rtol=tolerance, atol=tolerance)
