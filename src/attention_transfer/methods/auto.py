"""β = "auto": the term is the share of the teacher's variance that the student does not explain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import UserError
from .base import BetaMethod, Pairs, StudentLayers, TrainingFraction

# The weight of the unexplained share of the variance (results/defaults.md). The term has this value
# for a student whose map is the teacher's mean for every image.
AUTO_WEIGHT = 3.0
# The teacher's output is constant if its variance over the images is below this.
CONSTANT = 1e-6


class PairedBetaMethod(BetaMethod):
    """A method with a distance for each pair of layers, whose β may be "auto".

    With "auto" the term is `AUTO_WEIGHT` · Σ ½‖D‖² / Σ ½‖Y_teacher − its mean over images‖², both
    sums over the pairs. It does not depend on the sizes of the layers. The means are over
    `Transfer`'s example: use about 32 training images. A pair that cannot teach is left out.
    """

    has_auto_beta = True
    what = "map"  # what the method compares, for messages

    def __init__(self, beta: float | str, decay: str):
        super().__init__(beta, decay)
        self.needs_example = self.needs_example or self.is_auto
        self.pair_names: list[str] = []
        # {number of a pair that cannot teach: reason}
        self.left_out: dict[int, str] = {}
        self._auto_betas: list[float] = []
        if self.is_auto:
            # β of each pair, without the schedule. A run that continues must not compute it again,
            # because its example may come from a store; hence it is in the state.
            self.register_buffer("auto_betas", torch.zeros(0))

    @property
    def belongs_to_a_transfer(self) -> bool:
        return bool(self._auto_betas)

    def pair_betas(self) -> list[float] | None:
        """The weight of each pair, without β and its schedule; None: 1 each."""
        return self._auto_betas if self.is_auto else None

    def set_auto_betas(
        self,
        pairs: Pairs,
        student: StudentLayers,
        spreads: Sequence[float],
        units: Sequence[float],
    ) -> None:
        """Sets β of each pair from the teacher's outputs for the example.

        Args:
            student: the student's features; they require a gradient if they depend on a trained
                weight.
            spreads: ½‖Y_teacher − its mean‖² of each pair, a mean over images.
            units: the β of each pair for which its term is ½‖D‖².

        Raises:
            UserError: if the teacher's features are not finite, or no pair can teach.
        """
        self.pair_names = [f"{s}={t}" for s, t in pairs]
        if not all(math.isfinite(spread) for spread in spreads):
            raise UserError(
                f"beta is 'auto', but the teacher's {self.what}s of the example are not finite: "
                "expected finite features, or a number for beta"
            )
        trained = [features.requires_grad for features in student]
        self.left_out = {}
        for j, spread in enumerate(spreads):
            if spread < CONSTANT:
                self.left_out[j] = f"the teacher's {self.what} is the same for every image"
            elif any(trained) and not trained[j]:
                # `preflight` reports a student that is frozen as a whole.
                self.left_out[j] = f"no weight that is trained changes the student's {self.what}"
        used = [spread for j, spread in enumerate(spreads) if j not in self.left_out]
        if not used:
            raise UserError(
                f"beta is 'auto', but no pair can teach: the teacher's {self.what}s are the same "
                "for every image of the example, or the student's layers are frozen; expected an "
                "example of several images, or a number for beta"
            )
        betas = [AUTO_WEIGHT / sum(used) * unit for unit in units]
        for j in self.left_out:
            betas[j] = 0.0
        self.auto_betas = torch.tensor(betas, device=student[0].device)
        # From the buffer, so that a continued run has the same values: the buffer is float32.
        self._auto_betas = self.auto_betas.tolist()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.is_auto:
            # A list in addition to the buffer, so that a step reads no tensor for it.
            self._auto_betas = self.auto_betas.tolist()

    def weights(self, progress: TrainingFraction) -> dict[str, float]:
        """β in effect; under "auto" one for each pair: `beta[group0=group0]`."""
        if not self.is_auto:
            return super().weights(progress)
        factor = float(self.weight(progress))
        return {
            f"beta[{name}]": beta * factor
            for name, beta in zip(self.pair_names, self._auto_betas, strict=True)
        }
