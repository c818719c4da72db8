"""Checks the balance of labels and transfer after each epoch, and warns once if it is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from ..checks.balance import term_gradients
from ..checks.dead_student import dead_parts
from ..data.plan import TrainingBatch
from ..methods.base import Method
from ..transfer import Transfer
from .gradient_watch import GradientWatch

# Ratios of the gradient of transfer to that of the labels; outside of them, a warning is due.
TOO_STRONG, TOO_WEAK = 5.0, 0.02
IMAGES = 32  # the gradients are measured on this many images at the end of an epoch
EPOCHS = 3  # a warning needs the same fault in this many epochs in a row
# Share of ln K, the cross-entropy of a guess, above which the labels are not learned.
NOT_LEARNED = 0.8
# Under β = auto and KD a student may need this many steps before it begins to learn the labels.
SLOW_START = 300


class Watch:
    """Warns about the balance of the losses, dead layers and exploding gradients.

    Args:
        say: prints a line.
        classes: number of classes K.
        methods: those of the transfer.
    """

    def __init__(self, say: Callable[[str], None], classes: int, methods: Iterable[Method]):
        self.say, self.guess = say, math.log(classes)
        self.methods = {method.name: method for method in methods}
        self.has_warned = False  # about the balance
        self.warned_layers: set[str] = set()  # by `check_layers`

    def measure(
        self,
        transfer: Transfer,
        batch: TrainingBatch,
        progress: float,
        teacher_outputs: Callable[[Tensor, Tensor], Any],
    ) -> dict[str, dict[str, float]]:
        """The row's entry `gradients`: the norm of each term's gradient on some images of a batch.

        Empty for a student that learns alone. `teacher_outputs` returns the outputs of a store.
        """
        if not transfer.methods:
            return {}
        x, y, rows = (part[:IMAGES] for part in batch)
        return {"gradients": term_gradients(transfer, x, y, progress, teacher_outputs(x, rows))}

    def check_layers(
        self, transfer: Transfer, batch: TrainingBatch, gradients: GradientWatch
    ) -> None:
        """Warns, once each, of dead parts of the student and of an exploded gradient."""
        for part in dead_parts(transfer, batch.images[:IMAGES]):
            self._warn_once(part, f"the student is dead: {part}; try a lower --lr, or --clip-norm")
        if (text := gradients.describe_explosion()) is not None:
            self._warn_once("exploded", text)

    def _warn_once(self, subject: str, text: str) -> None:
        if subject not in self.warned_layers:
            self.warned_layers.add(subject)
            self.say(f"warning: {text}")

    def check_balance(self, rows: list[dict[str, Any]], progress: float) -> None:
        """Warns at most once in a run, after an epoch that ended at `progress`."""
        if self.has_warned or len(rows) < EPOCHS:
            return
        ratios = [ratio for row in rows[-EPOCHS:] if (ratio := transfer_ratio(row)) is not None]
        if len(ratios) < EPOCHS:
            return
        low, high = min(ratios), max(ratios)
        method = self.methods[strongest_term(rows[-1])]
        loss = rows[-1]["train_loss"]
        text = None
        if high < TOO_WEAK:
            text = (
                f"transfer does next to nothing: its gradient is {high:.1%} of the labels'; "
                f"{method.weight_advice('raise')}"
            )
        elif low > TOO_STRONG and not self._is_learning(rows[-1], progress, method):
            text = (
                f"transfer outweighs the labels: its gradient is {low:.0f} times theirs, and the "
                f"student has not learned them (training cross-entropy {loss:.2f}, a guess has "
                f"{self.guess:.2f}); {method.weight_advice('lower')}"
            )
        if text is not None:
            self.has_warned = True
            self.say(f"warning: {text}")

    def _is_learning(self, row: dict[str, Any], progress: float, method: Method) -> bool:
        """Whether the student learns the labels, or it is too early to tell."""
        if progress <= 0.25 or (method.starts_slowly and row["step"] < SLOW_START):
            return True
        return bool(row["train_loss"] <= NOT_LEARNED * self.guess)


def transfer_ratio(row: dict[str, Any]) -> float | None:
    """The sum of the gradients of transfer over that of the labels; None if not recorded."""
    gradients = dict(row.get("gradients", {}))
    labels = gradients.pop("ce", 0.0)
    if not gradients or not labels:
        return None
    return float(sum(gradients.values()) / labels)


def strongest_term(row: dict[str, Any]) -> str:
    """The name of the term of transfer with the largest gradient."""
    gradients = {name: norm for name, norm in row["gradients"].items() if name != "ce"}
    return max(gradients, key=lambda name: gradients[name])
