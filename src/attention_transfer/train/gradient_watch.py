"""Watches the gradient of each layer: where it stops being finite, and where it explodes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# A gradient counts as exploded at this many times its mean over the other steps of an epoch.
EXPLOSION_RATIO = 1000.0
MIN_STEPS = 10  # a mean over fewer steps is not reliable


class GradientWatch:
    """The norm of each weight's gradient over the steps of an epoch.

    The norms are kept on the device: `update` does not synchronise, reading them does.

    Args:
        parameters: names and weights of the student and the adapters.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], device: torch.device):
        trained = {name: p for name, p in parameters if p.requires_grad}
        self.names = [name.removeprefix("student.") for name in trained]
        self.parameters = list(trained.values())
        self.zero = torch.zeros((), device=device)
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Resets the norms."""
        self.count = 0
        self.finite_steps, self.sums, self.largest = self.zero.new_zeros(3, len(self.names))

    @torch.no_grad()
    def update(self) -> None:
        """Adds the gradients of a step; call it after the backward pass."""
        gradients = [self.zero if p.grad is None else p.grad for p in self.parameters]
        norms: Tensor = torch.stack(torch._foreach_norm(gradients)).to(self.zero)
        self.finite_steps += norms.isfinite()
        self.sums += norms
        self.largest = torch.maximum(self.largest, norms)
        self.count += 1

    def first_bad_layer(self) -> tuple[int, str] | None:
        """(The number of steps before it, the weight) of the first gradient that is not finite.

        Once the gradient of a weight is not finite, it stays so in all later steps.
        """
        counts = self.finite_steps.tolist()
        first = int(min(counts, default=self.count))
        if first == self.count:
            return None
        # Gradients flow from the output to the input, so the last layer is nearest to the cause.
        bad = [name for name, count in zip(self.names, counts, strict=True) if count == first]
        return first, bad[-1]

    def describe_explosion(self) -> str | None:
        """A warning if the largest gradient of the epoch is out of proportion."""
        if self.count < MIN_STEPS or not self.names:
            return None
        layer = int(self.largest.argmax())
        largest, total = float(self.largest[layer]), float(self.sums[layer])
        mean = (total - largest) / (self.count - 1)
        if not largest > EXPLOSION_RATIO * mean > 0:
            return None
        return (
            f"the gradient of {self.names[layer]} exploded in one step of the epoch: its norm was "
            f"{largest:.2g}, that of the other steps {mean:.2g}; try a lower --lr, or --clip-norm"
        )
