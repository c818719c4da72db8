"""The authors' CIFAR-10 training step in plain PyTorch: the baseline of the benches.

As in szagoruyko/attention-transfer, cifar.py: float32, eager, a functional WRN over a dictionary of
tensors, `F.normalize(x.pow(2).mean(1))`, KL + CE, SGD with momentum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..models.create import create_model
from .in_subprocess import in_subprocess
from .measure import Measure
from .options import BenchOptions

Params = dict[str, Tensor]
Images = tuple[Any, Any]  # images (N, 32, 32, 3) uint8 and labels (N,), as NumPy arrays
MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]  # of CIFAR-10, as in their script


def network(x: Tensor, params: Params, depth: int, training: bool) -> tuple[Tensor, list[Tensor]]:
    """Logits (N, K) and the outputs of the three groups."""

    def bn(x: Tensor, name: str) -> Tensor:
        mean, variance = params[f"{name}.running_mean"], params[f"{name}.running_var"]
        weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
        return F.batch_norm(x, mean, variance, weight, bias, training)

    x = F.conv2d(x, params["conv0.weight"], padding=1)
    groups = []
    for g in range(3):
        for b in range((depth - 4) // 6):
            base = f"group{g}.block{b}"
            stride = 2 if g > 0 and b == 0 else 1
            o = F.relu(bn(x, f"{base}.bn0"))
            z = F.conv2d(o, params[f"{base}.conv0.weight"], stride=stride, padding=1)
            z = F.conv2d(F.relu(bn(z, f"{base}.bn1")), params[f"{base}.conv1.weight"], padding=1)
            # Only if the number of channels changes; otherwise the block adds its input.
            shortcut = params.get(f"{base}.convdim.weight")
            if shortcut is not None:
                x = F.conv2d(o, shortcut, stride=stride)
            x = z + x
        groups.append(x)
    o = F.relu(bn(x, "bn"))
    o = F.avg_pool2d(o, o.shape[-1], 1, 0).view(len(o), -1)
    return F.linear(o, params["fc.weight"], params["fc.bias"]), groups


def at(x: Tensor) -> Tensor:
    return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))


def distillation(
    y: Tensor, teacher_scores: Tensor, labels: Tensor, temperature: float, alpha: float
) -> Tensor:
    p = F.log_softmax(y / temperature, dim=1)
    q = F.softmax(teacher_scores / temperature, dim=1)
    l_kl = F.kl_div(p, q, reduction="sum") * temperature**2 / y.shape[0]
    return l_kl * alpha + F.cross_entropy(y, labels) * (1.0 - alpha)


class AuthorsInference:
    """The teacher alone: logits and group outputs of (N, 3, 32, 32) float32, without gradients."""

    def __init__(self, teacher: str):
        torch.manual_seed(0)
        self.depth = _depth(teacher)
        self.params: Params = dict(create_model(teacher, 10).state_dict())

    def __call__(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        with torch.no_grad():
            return network(x, self.params, self.depth, training=False)

    def to(self, device: str) -> AuthorsInference:
        _move(self.params, device)
        return self


class AuthorsStep:
    """One AT+KD step on batches (N, 3, 32, 32) float32; `reads_loss`: as their meters read it."""

    def __init__(self, student: str, teacher: str, reads_loss: bool = False):
        self.teacher = AuthorsInference(teacher)
        self.depth, self.reads_loss = _depth(student), reads_loss
        self.student: Params = dict(create_model(student, 10).state_dict())
        # Their weight decay includes norms and biases.
        names = [name for name in self.student if name.endswith(("weight", "bias"))]
        learned = [self.student[name].requires_grad_() for name in names]
        self.optimizer = torch.optim.SGD(learned, 0.1, momentum=0.9, weight_decay=5e-4)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        y_t, g_t = self.teacher(x)
        y_s, g_s = network(x, self.student, self.depth, training=True)
        # Temperature, α and β as in their AT+KD runs.
        loss = distillation(y_s, y_t, y, 4, 0.9)
        for s, t in zip(g_s, g_t, strict=True):
            loss = loss + 1e3 * (at(s) - at(t)).pow(2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.reads_loss:
            loss.item()
        return loss

    def to(self, device: str) -> AuthorsStep:
        self.teacher.to(device)
        _move(self.student, device)
        return self


def _depth(name: str) -> int:
    return int(name.split("-")[1])


def _move(params: Params, device: str) -> None:
    for tensor in params.values():
        # In place: the optimiser holds these tensors.
        tensor.data = tensor.data.to(device)


class AuthorsImages(Dataset[tuple[Tensor, int]]):
    """Images that PIL transforms one at a time, as in the authors' script."""

    def __init__(self, images: Any, labels: Any):
        from torchvision import transforms as T

        self.images, self.labels = images, labels
        self.transform = T.Compose(
            [
                T.Pad(4, padding_mode="reflect"),
                T.RandomHorizontalFlip(),
                T.RandomCrop(32),
                T.ToTensor(),
                T.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


def authors_loader(
    data: Images, batch_size: int, workers: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of the authors' loader; by default one worker per thread."""
    if workers is None:
        workers = torch.get_num_threads()
    loader = DataLoader(
        AuthorsImages(*data),
        batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,  # every step has the same number of images
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


def authors_step(
    options: BenchOptions, device: torch.device | str, data: Images | None = None, size: int = 32
) -> AbstractContextManager[Measure]:
    """Measures their step in a subprocess; with `data`, (images, labels), including loading."""
    loader = None
    if data is not None:
        loader = partial(authors_loader, data, options.batch_size)
    make = partial(AuthorsStep, options.student, options.teacher, reads_loss=data is not None)
    return in_subprocess(make, options, device, loader, size)
