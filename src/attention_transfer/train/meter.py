"""Running sums of an epoch, kept on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor

from .state_checks import check_same_kind


class Meter:
    """Sums over the images of an epoch: cross-entropy, correct answers, and each term of the loss.

    It also keeps the first step at which each term was not finite, on the device, so that the
    check for a diverged run does not synchronise in every step.

    Args:
        terms: the names of the terms of the loss.
        pairs: (student layer, teacher layer) of each pair, to name the one that is not finite.
    """

    def __init__(
        self, terms: list[str], device: torch.device, pairs: Sequence[tuple[str, str]] = ()
    ):
        self.terms = terms
        self.pairs = [f"{s} ← {t}" for s, t in pairs]
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.sums = torch.zeros(2 + len(terms), device=device, dtype=dtype)
        self.images = 0
        # The entries of `first_bad`: (term, ""), and (term, pair) for a pair's share of a term.
        self.watched = [(term, "") for term in terms]
        self.first_bad = torch.full((len(terms),), -1, device=device, dtype=torch.int64)

    def update(
        self,
        logits: Tensor,
        labels: Tensor,
        parts: Mapping[str, Tensor],
        step: int,
        pair_terms: Mapping[str, Sequence[Tensor]] = MappingProxyType({}),
    ) -> None:
        """Adds a batch: logits (N, K), labels (N,) or (N, K), and the terms, means over it.

        `pair_terms` are the shares of the pairs in a term, {term: a scalar for each pair}.
        """
        logits = logits.detach().float()
        shares = [share for of_pairs in pair_terms.values() for share in of_pairs]
        watched = torch.stack([p.detach() for p in [*parts.values(), *shares]])
        watched = watched.to(self.sums.dtype)
        terms = watched[: len(parts)]
        hard_labels = labels
        if labels.is_floating_point():
            hard_labels = labels.argmax(1)  # of mixed images, the one with the larger share
        correct = (logits.argmax(1) == hard_labels).sum()
        n = len(labels)
        first = torch.stack([F.cross_entropy(logits, labels) * n, correct]).to(self.sums.dtype)
        self.sums += torch.cat([first, terms * n])
        if len(self.first_bad) < len(watched):  # the first step of the epoch
            self._watch_pairs(pair_terms)
        newly_bad = (self.first_bad < 0) & ~watched.isfinite()
        self.first_bad = torch.where(newly_bad, step, self.first_bad)
        self.images += n

    def _watch_pairs(self, pair_terms: Mapping[str, Sequence[Tensor]]) -> None:
        self.watched = [(term, "") for term in self.terms]
        for term in pair_terms:
            self.watched += [(term, pair) for pair in self.pairs]
        more = len(self.watched) - len(self.first_bad)
        self.first_bad = torch.cat([self.first_bad, self.first_bad.new_full((more,), -1)])

    def first_fault(self) -> tuple[int, str] | None:
        """The first step at which the loss was not finite, and the names of the terms and pairs."""
        steps = self.first_bad.tolist()
        step = min((s for s in steps if s >= 0), default=None)
        if step is None:
            return None
        bad: dict[str, list[str]] = {}
        # Not strict: a restored snapshot may be older than the entries of the pairs.
        for (term, pair), first in zip(self.watched, steps, strict=False):
            if first == step:
                bad.setdefault(term, []).append(pair)
        texts = []
        for term, (_, *pairs) in bad.items():
            # A fault spreads from layer to layer, so the first pair is nearest to the cause.
            if pairs:
                term += f" (pair {pairs[0]})"
            texts.append(term)
        return step, ", ".join(texts)

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
        """The sums and the number of images of all ranks; a state with a fault is never saved."""
        images = self.all_images(fabric)
        return {"sums": self._all_sums(fabric), "images": images}

    def load_state_dict(self, state: dict[str, Any], fabric: Fabric) -> None:
        check_same_kind(state["images"], self.images, "its number of images")
        if state["sums"].shape != self.sums.shape:
            raise ValueError("its sums are of other terms")
        if fabric.is_global_zero:  # the other ranks start at zero: the saved sums are over all
            self.sums.copy_(state["sums"])
            self.images = state["images"]

    def all_images(self, fabric: Fabric) -> int:
        """The images of all ranks so far; all ranks must call this."""
        return int(self._sum(torch.tensor(self.images, device=self.sums.device), fabric))

    def _all_sums(self, fabric: Fabric) -> Tensor:
        return self._sum(self.sums.clone(), fabric)

    def _sum(self, values: Tensor, fabric: Fabric) -> Tensor:
        sums = fabric.all_reduce(values, reduce_op="sum")
        assert isinstance(sums, Tensor)
        return sums
