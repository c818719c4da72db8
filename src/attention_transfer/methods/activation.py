"""Activation-based attention transfer: β · Σ over pairs of the distance between normalised maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from .. import maps
from ..errors import UserError
from ..map_inputs import StoredMap
from ..map_options import LossOptions, MapOptions
from ..options import subset
from .base import BetaMethod, Pairs, StepInputs, check_weight, schedule_factor

# In shares of the number of steps. A β above the first (under `authors`, its mean over a schedule)
# was too heavy where it was tried (1000 in 280 to 370 steps, constant or linear to zero); one of
# the second did well (100 there).
HEAVY_BETA = 0.5
GOOD_BETA = 0.25


class ActivationTransfer(BetaMethod):
    """β · `at_loss` (Eq. 2 of the paper, or the authors' code: see `convention`).

    Args:
        beta: β; 1000 goes with `authors`. A run of a few hundred steps wants less (100).
        kind, p, convention, resize, norm, axis, weights: as in `at_loss`.
        decay: `constant`, `linear` or `cosine` (both to zero), `step` (×0.2 at 30, 60 and 80 % of
            the training), or `warm-up` (from zero over the first tenth), alone or before one of
            them (`warm-up+linear`).

    Raises:
        UserError: (a ValueError) for a wrong option.
    """

    name = "at"
    part = "at"
    needs_teacher = True
    needs_features = True
    # In the paper, β decays where attention transfer is combined with distillation.
    defaults_with = {"kd": {"decay": "linear"}}

    def __init__(
        self,
        beta: float = 1e3,
        kind: str = "sum",
        p: float = 2.0,
        convention: str = "authors",
        resize: str = "map",
        norm: float = 2.0,
        axis: str = "space",
        weights: Sequence[float] | None = None,
        decay: str = "constant",
    ):
        super().__init__(beta, decay)
        self.options = maps.make_options(LossOptions, kind, p, axis, convention, resize, norm)
        self.map_options = subset(self.options, MapOptions)
        self.pair_weights: list[float] | None = None
        if weights is not None:
            if isinstance(weights, (str, Mapping)) or not isinstance(weights, Iterable):
                raise UserError(f"weights is {weights!r}: expected a list of numbers, one a pair")
            self.pair_weights = [check_weight("weights", w) for w in weights]

    def forward(self, step: StepInputs) -> Tensor:
        return maps.map_loss(
            step.student_features, step.teacher_features, self.options, self.pair_weights
        )

    def prepare(
        self, pairs: Pairs, student: Sequence[Tensor], teacher: Sequence[Tensor | StoredMap]
    ) -> None:
        if self.pair_weights is not None and len(self.pair_weights) != len(pairs):
            raise UserError(
                f"weights has {len(self.pair_weights)} numbers for {len(pairs)} pairs: "
                "expected one a pair"
            )
        # Dicts, so that an error names the layers.
        names = [f"pair {j} ({s} ← {t})" for j, (s, t) in enumerate(pairs)]
        students = dict(zip(names, student, strict=True))
        maps.map_loss(students, dict(zip(names, teacher, strict=True)), self.options)

    def describe(
        self, pairs: Pairs, student: Sequence[Tensor], teacher: Sequence[Tensor | StoredMap]
    ) -> list[str]:
        """A line a pair: layers, sizes, and the effective weight of β under the conventions."""
        conventions = ["paper"] if self.options.convention == "paper" else ["authors", "caffe"]
        lines = []
        for j, ((s, t), fs, ft) in enumerate(zip(pairs, student, teacher, strict=True)):
            beta = self.beta
            if self.pair_weights is not None:
                beta *= self.pair_weights[j]
            positions = maps.paired_maps(fs, ft, self.options)[0].shape[1]
            betas = []
            for convention in conventions:
                converted = maps.convert_beta(beta, self.options.convention, convention, positions)
                betas.append(f"{converted:.5g} ({convention})")
            kept = " a map" * isinstance(ft, StoredMap)
            sizes = f"{tuple(fs.shape[1:])} and{kept} {tuple(ft.shape[1:])}"
            lines.append(f"{s} ← {t}: {sizes}, M = {positions}, β = {', '.join(betas)}")
        return lines

    def warnings(self, steps: int) -> list[str]:
        # The mean of β over the schedule, at 21 points.
        factors = [float(schedule_factor(self.decay, k / 20)) for k in range(21)]
        mean = self.beta * sum(factors) / len(factors)
        if self.options.convention != "authors" or mean <= HEAVY_BETA * steps:
            return []
        # One significant digit: the advice is no more exact than that.
        good = float(f"{GOOD_BETA * steps:.1g}")
        return [f"β = {self.beta:g} is likely too heavy for {steps} steps: try --beta {good:g}"]
