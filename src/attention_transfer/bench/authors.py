"""The authors' CIFAR-10 training step, written plainly: the yardstick of the benches.

Their arithmetic (szagoruyko/attention-transfer, cifar.py): float32, eager, a functional WRN over a dictionary of
tensors, `F.normalize(x.pow(2).mean(1))`, KL + CE, SGD with momentum. It runs in a process of its own, whose allocator
and threads nobody has tuned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Params = dict[str, Tensor]


def network(x: Tensor, params: Params, depth: int, training: bool) -> tuple[Tensor, list[Tensor]]:
    """Logits and the three groups' outputs."""

    def bn(x: Tensor, name: str) -> Tensor:
        w, b, m, v = (
            params[f"{name}.{k}"] for k in ("weight", "bias", "running_mean", "running_var")
        )
        return F.batch_norm(x, m, v, w, b, training)

    x = F.conv2d(x, params["conv0.weight"], padding=1)
    groups = []
    for g in range(3):
        for b in range((depth - 4) // 6):
            base = f"group{g}.block{b}"
            stride = 2 if g > 0 and b == 0 else 1
            o = F.relu(bn(x, f"{base}.bn0"))
            z = F.conv2d(o, params[f"{base}.conv0.weight"], stride=stride, padding=1)
            z = F.conv2d(F.relu(bn(z, f"{base}.bn1")), params[f"{base}.conv1.weight"], padding=1)
            key = f"{base}.convdim.weight"
            x = z + (F.conv2d(o, params[key], stride=stride) if key in params else x)
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


class AuthorsStep:
    """One AT+KD step on batches (N, 3, 32, 32) float32."""

    def __init__(self, student: str, teacher: str, classes: int = 10):
        from ..models import create_model

        torch.manual_seed(0)
        self.depths = [int(name.split("-")[1]) for name in (student, teacher)]
        self.student = dict(create_model(student, classes).state_dict())
        self.teacher = dict(create_model(teacher, classes).state_dict())
        learned = [
            p.requires_grad_() for k, p in self.student.items() if k.endswith(("weight", "bias"))
        ]
        self.optimizer = torch.optim.SGD(learned, 0.1, momentum=0.9, weight_decay=5e-4)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            y_t, g_t = network(x, self.teacher, self.depths[1], training=False)
        y_s, g_s = network(x, self.student, self.depths[0], training=True)
        loss = distillation(y_s, y_t, y, 4, 0.9)
        loss = loss + 1e3 * sum(
            (at(s) - at(t)).pow(2).mean() for s, t in zip(g_s, g_t, strict=True)
        )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss

    def to(self, device: str) -> AuthorsStep:
        _move((self.student, self.teacher), device)
        return self


class AuthorsInference:
    """The teacher alone: logits and the groups' outputs of batches (N, 3, 32, 32) float32, without gradients.

    `state` is that of a `WideResNet` of this name, or None for random weights.
    """

    def __init__(self, teacher: str, classes: int = 10, state: Params | None = None):
        from ..models import create_model

        torch.manual_seed(0)
        self.depth = int(teacher.split("-")[1])
        self.teacher = dict(create_model(teacher, classes).state_dict() if state is None else state)

    def __call__(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        with torch.no_grad():
            return network(x, self.teacher, self.depth, training=False)

    def to(self, device: str) -> AuthorsInference:
        _move((self.teacher,), device)
        return self


def _move(networks: tuple[Params, ...], device: str) -> None:
    for params in networks:
        for tensor in params.values():
            tensor.data = tensor.data.to(device)


class AuthorsImages(Dataset[tuple[Tensor, int]]):
    """Images (N, 32, 32, 3) uint8, transformed one at a time by PIL as in the authors' script."""

    def __init__(self, images: Any, labels: Any):
        from torchvision import transforms as T

        self.images, self.labels = images, labels
        self.transform = T.Compose(
            [
                T.Pad(4, padding_mode="reflect"),
                T.RandomHorizontalFlip(),
                T.RandomCrop(32),
                T.ToTensor(),
                T.Normalize([0.49, 0.48, 0.45], [0.25, 0.24, 0.26]),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


def authors_loader(
    images: Any, labels: Any, batch_size: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches as the authors' loader makes them: PIL transforms, image by image, in worker processes."""
    dataset = AuthorsImages(images, labels)
    loader = DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


def serve(
    pipe: Connection,
    make: Callable[[], Any],
    batch_size: int,
    device: str,
    data: tuple[Any, Any] | None,
    size: int = 32,
) -> None:
    """The process: answers each number of steps with the seconds they took; with `data`, loading included.

    `make` gives what is timed: a call with a batch (N, 3, size, size) and its labels, and `to(device)`.
    """
    torch.backends.cudnn.benchmark = True  # as in their script
    step = make().to(device)
    if data is None:
        torch.manual_seed(1)
        fixed = (
            torch.randn(batch_size, 3, size, size, device=device),
            torch.randint(10, (batch_size,), device=device),
        )
        batches: Iterator[tuple[Tensor, Tensor]] = iter(lambda: fixed, None)
    else:
        batches = authors_loader(*data, batch_size, torch.get_num_threads())
    total = 0.0
    while (steps := pipe.recv()) is not None:
        start = time.perf_counter()
        for _ in range(steps):
            x, y = next(batches)
            out = step(x.to(device), y.to(device))
            if data is not None:
                total += out.item()  # their meters read every step's loss
        if device == "cuda":
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - start)
