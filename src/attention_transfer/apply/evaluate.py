"""Accuracy and cross-entropy of a network on a set of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Images, StreamSet

# Streamed images are large, and a few batches of each worker wait for their turn.
STREAMED_BATCH = 128

Forward = Callable[[Tensor], Tensor]


def batches(
    images: Images, batch_size: int, device: torch.device | str
) -> Iterator[tuple[Tensor, int]]:
    """Float batches in [0, 1], (batch_size, 3, H, W) channels_last, and how many of each count.

    The last is filled up with the set's first images, so that a compiled network sees one shape only.
    """
    count = len(images)
    batch_size = min(batch_size, count)
    if isinstance(images, StreamSet):
        batch_size = min(batch_size, STREAMED_BATCH)
        on_cuda = torch.device(device).type == "cuda"
        for k, x in enumerate(images.batches(batch_size, pin=on_cuda)):
            yield as_input(x.to(device, non_blocking=True)), min(batch_size, count - k * batch_size)
        return
    for start in range(0, count, batch_size):
        index = torch.arange(start, start + batch_size, device=images.images.device) % count
        yield as_input(images.batch(index).to(device)), min(batch_size, count - start)


def as_input(x: Tensor) -> Tensor:
    """uint8 images -> float32 in [0, 1], in the same memory format."""
    return x.float() / 255


@torch.no_grad()
def predict(
    forward: Forward, images: Images, batch_size: int, device: torch.device | str
) -> Tensor:
    """Logits (N, K), float32, on the device."""
    return torch.cat([forward(x)[:n].float() for x, n in batches(images, batch_size, device)])


def evaluate(
    forward: Forward, images: Images, batch_size: int, device: torch.device | str
) -> dict[str, float]:
    """`loss` (cross-entropy, mean), `accuracy` in [0, 1], and above 10 classes `top5`; unreadable images left out."""
    logits = predict(forward, images, batch_size, device)
    labels = images.labels.to(device)
    if images.bad:
        good = torch.tensor([i for i in range(len(images)) if i not in images.bad], device=device)
        logits, labels = logits[good], labels[good]
    found = {
        "loss": F.cross_entropy(logits, labels),
        "accuracy": (logits.argmax(1) == labels).float().mean(),
    }
    if len(images.classes) > 10:
        found["top5"] = (logits.topk(5).indices == labels[:, None]).any(1).float().mean()
    return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))
