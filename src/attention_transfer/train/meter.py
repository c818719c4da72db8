"""Running sums of an epoch, kept on the device."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor

from ..errors import RunError

KEPT = "the last good checkpoint is kept; try a lower --lr or --beta in another --out"


class Meter:
    """Sums over the images of an epoch: cross-entropy, correct answers, and each term of the loss.

    It also keeps the first step at which each term was not finite, so that finding a diverged
    run does not synchronise at every step.
    """

    def __init__(self, terms: list[str], device: torch.device):
        self.terms = terms
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.sums = torch.zeros(2 + len(terms), device=device, dtype=dtype)
        self.images = 0
        self.first_bad = torch.full((len(terms),), -1, device=device, dtype=torch.int64)

    def update(self, logits: Tensor, labels: Tensor, parts: dict[str, Tensor], step: int) -> None:
        """Adds a batch: logits (N, K), labels (N,) or (N, K), and the terms, means over it."""
        logits = logits.detach().float()
        terms = torch.stack([p.detach() for p in parts.values()]).to(self.sums.dtype)
        hard_labels = labels
        if labels.is_floating_point():
            hard_labels = labels.argmax(1)  # of mixed images, the one with the larger share
        correct = (logits.argmax(1) == hard_labels).sum()
        n = len(labels)
        first = torch.stack([F.cross_entropy(logits, labels) * n, correct]).to(self.sums.dtype)
        self.sums += torch.cat([first, terms * n])
        newly_bad = (self.first_bad < 0) & ~terms.isfinite()
        self.first_bad = torch.where(newly_bad, step, self.first_bad)
        self.images += n

    def check(self) -> None:
        """Raises `RunError` with the first step and the terms of the loss that were not finite."""
        bad = {t: s for t, s in zip(self.terms, self.first_bad.tolist(), strict=True) if s >= 0}
        if bad:
            step = min(bad.values())
            terms = ", ".join(term for term, s in bad.items() if s == step)
            raise RunError(f"the loss is not finite: first at step {step} in {terms}; {KEPT}")

    def means(self, fabric: Fabric) -> tuple[float, float, dict[str, float]]:
        """Cross-entropy, accuracy and terms, over all ranks."""
        loss, accuracy, *terms = (self._all_sums(fabric) / self.all_images(fabric)).tolist()
        return loss, accuracy, dict(zip(self.terms, terms, strict=True))

    def snapshot(self) -> tuple[Tensor, int, Tensor]:
        """The sums of this rank, for `load_snapshot`."""
        return self.sums.clone(), self.images, self.first_bad.clone()

    def load_snapshot(self, snapshot: tuple[Tensor, int, Tensor]) -> None:
        self.sums, self.images, self.first_bad = snapshot

    def state_dict(self, fabric: Fabric) -> dict[str, Any]:
        """The sums and the number of images are those of all ranks."""
        images = self.all_images(fabric)
        return {"sums": self._all_sums(fabric), "images": images, "first_bad": self.first_bad}

    def load_state_dict(self, state: dict[str, Any], fabric: Fabric) -> None:
        if fabric.is_global_zero:  # the other ranks start at zero, so that nothing counts twice
            self.sums.copy_(state["sums"])
            self.images = state["images"]
        self.first_bad.copy_(state["first_bad"])

    def all_images(self, fabric: Fabric) -> int:
        """The images of all ranks so far; all ranks must call this."""
        return int(self._sum(torch.tensor(self.images, device=self.sums.device), fabric))

    def _all_sums(self, fabric: Fabric) -> Tensor:
        return self._sum(self.sums.clone(), fabric)

    def _sum(self, values: Tensor, fabric: Fabric) -> Tensor:
        sums = fabric.all_reduce(values, reduce_op="sum")
        assert isinstance(sums, Tensor)
        return sums
