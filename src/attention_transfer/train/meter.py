"""Running sums of an epoch, on the device."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor

from ..errors import RunError

KEPT = "the last good checkpoint is kept; try a lower --lr or --beta in another --out"


class Meter:
    """Sums over an epoch's images, on the device: cross-entropy, correct answers, and each part of the loss.

    The first step whose part is not finite is kept too, so that it costs no synchronisation until somebody asks.
    """

    def __init__(self, parts: list[str], device: torch.device):
        self.parts = parts
        wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.sums = torch.zeros(2 + len(parts), device=device, dtype=wide)
        self.images = 0
        self.first_bad = torch.full((len(parts),), -1, device=device, dtype=torch.int64)

    def update(self, logits: Tensor, labels: Tensor, parts: dict[str, Tensor], step: int) -> None:
        logits = logits.detach().float()
        values = torch.stack([p.detach() for p in parts.values()]).to(self.sums.dtype)
        hard = (
            labels.argmax(1) if labels.is_floating_point() else labels
        )  # of mixed images, the larger share's
        right = (logits.argmax(1) == hard).sum()
        n = len(labels)
        first = torch.stack([F.cross_entropy(logits, labels) * n, right]).to(self.sums.dtype)
        self.sums += torch.cat([first, values * n])
        self.first_bad = torch.where(
            (self.first_bad < 0) & ~values.isfinite(), step, self.first_bad
        )
        self.images += n

    def check(self) -> None:
        """Raises `RunError` that names the first step and part of the loss that was not finite."""
        bad = self.first_bad.tolist()
        steps = [(step, part) for step, part in zip(bad, self.parts, strict=True) if step >= 0]
        if steps:
            step = min(steps)[0]
            names = ", ".join(part for s, part in steps if s == step)
            raise RunError(f"the loss is not finite: first at step {step} in {names}; {KEPT}")

    def means(self, fabric: Fabric) -> tuple[float, float, dict[str, float]]:
        """Cross-entropy, accuracy, parts, over all processes."""
        sums = fabric.all_reduce(self.sums.clone(), reduce_op="sum")
        assert isinstance(sums, Tensor)
        loss, right, *parts = (sums / (self.images * fabric.world_size)).tolist()
        return loss, right, dict(zip(self.parts, parts, strict=True))

    def state_dict(self, fabric: Fabric) -> dict[str, Any]:
        """The sums are those of all processes."""
        sums = fabric.all_reduce(self.sums.clone(), reduce_op="sum")
        return {"sums": sums, "images": self.images, "first_bad": self.first_bad}

    def load_state_dict(self, state: dict[str, Any], fabric: Fabric) -> None:
        if fabric.is_global_zero:
            self.sums.copy_(state["sums"])
        self.images = state["images"]
        self.first_bad.copy_(state["first_bad"])
