"""Activation-based attention transfer: β · Σ over pairs of the distance between normalised maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from .. import maps
from ..errors import UserError
from ..map_inputs import StoredMap
from ..map_options import LossOptions, MapOptions
from ..options import subset
from .base import BetaMethod, Pairs, StepInputs, TrainingFraction, check_weight, schedule_factor
from .options import AUTO

# What β = "auto" stands for: the weight of a pair per unit of ½‖D‖², or of ½‖D‖ under `paper`.
# From 1 to 10 students are level, on every pair of networks that was tried (results/defaults.md).
AUTO_WEIGHT = 3.0
# Maps with less variance over the images than this say the same of every image.
CONSTANT = 1e-6

# In shares of the number of steps. A β above the first (under `authors`, its mean over a schedule)
# was too heavy where it was tried (1000 in 280 to 370 steps, constant or linear to zero); one of
# the second did well (100 there).
HEAVY_BETA = 0.5
GOOD_BETA = 0.25


class ActivationTransfer(BetaMethod):
    """β · `at_loss` (Eq. 2 of the paper, or the authors' code: see `convention`).

    Args:
        beta: β under `convention`; the paper's 1000 goes with `authors` and tens of thousands of
            steps. "auto" weighs every pair by the energy of its map difference, whatever its size:
            `AUTO_WEIGHT` · ½‖D‖² (under `paper`, · ½‖D‖). A pair that cannot teach weighs 0.
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
    has_auto_beta = True
    # In the paper, β decays where attention transfer is combined with distillation.
    defaults_with = {"kd": {"decay": "linear"}}

    def __init__(
        self,
        beta: float | str = AUTO,
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
        # Why a pair cannot teach, by its number; known from an example.
        self.left_out: dict[int, str] = {}
        self.pair_names: list[str] = []
        self.recorded: list[float] = []  # β of each pair under "auto", before its schedule
        self.options = maps.make_options(LossOptions, kind, p, axis, convention, resize, norm)
        self.map_options = subset(self.options, MapOptions)
        self.pair_weights: list[float] | None = None
        if weights is not None:
            if isinstance(weights, (str, Mapping)) or not isinstance(weights, Iterable):
                raise UserError(f"weights is {weights!r}: expected a list of numbers, one a pair")
            self.pair_weights = [check_weight("weights", w) for w in weights]

    def forward(self, step: StepInputs) -> Tensor:
        student, teacher = step.student_features, step.teacher_features
        weights = self.pair_weights
        if self.is_auto:
            weights = self.recorded or self._pair_betas(student, teacher)
        return maps.map_loss(student, teacher, self.options, weights)

    def prepare(
        self, pairs: Pairs, student: Sequence[Tensor], teacher: Sequence[Tensor | StoredMap]
    ) -> None:
        if self.pair_weights is not None and len(self.pair_weights) != len(pairs):
            raise UserError(
                f"weights has {len(self.pair_weights)} numbers for {len(pairs)} pairs: "
                "expected one a pair"
            )
        self.pair_names = [f"{s}={t}" for s, t in pairs]
        # Dicts, so that an error names the layers.
        names = [f"pair {j} ({s} ← {t})" for j, (s, t) in enumerate(pairs)]
        students = dict(zip(names, student, strict=True))
        maps.map_loss(students, dict(zip(names, teacher, strict=True)), self.options)
        if self.is_auto:
            self.left_out = self._find_useless(student, teacher)
            self.recorded = self._pair_betas(student, teacher)

    def _find_useless(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor | StoredMap]
    ) -> dict[int, str]:
        """{number of a pair: why the student can learn nothing from it}."""
        reasons = {}
        trained = [features.requires_grad for features in student]
        for j, (fs, ft) in enumerate(zip(student, teacher, strict=True)):
            # A store shows its maps only as they are read.
            if not isinstance(ft, StoredMap) and self._is_constant(fs, ft):
                reasons[j] = "the teacher's map is the same for every image"
            elif any(trained) and not trained[j]:
                reasons[j] = "no weight that is trained changes the student's map"
        if len(reasons) == len(student):
            return {}  # preflight says what is wrong
        return reasons

    def _is_constant(self, student: Tensor, teacher: Tensor) -> bool:
        """Whether the teacher's map says the same of every image of the example."""
        y = maps.paired_maps(student, teacher, self.options)[1]
        spread = (y - y.mean(0)).square().sum(1).mean()
        return len(y) > 1 and float(spread) < CONSTANT

    def _pair_betas(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor | StoredMap]
    ) -> list[float]:
        """β of each pair under the convention."""
        betas = []
        for j, (fs, ft) in enumerate(zip(student, teacher, strict=True)):
            beta = self.beta
            if self.is_auto:
                beta = self._auto_beta(maps.map_positions(fs, ft, self.options))
            if self.pair_weights is not None:
                beta *= self.pair_weights[j]
            if j in self.left_out:
                beta = 0.0
            betas.append(beta)
        return betas

    def _auto_beta(self, positions: int) -> float:
        """The β of a pair with maps of this size that "auto" stands for."""
        if self.options.convention == "paper":
            return AUTO_WEIGHT
        return maps.convert_beta(AUTO_WEIGHT, "caffe", self.options.convention, positions)

    def weights(self, progress: TrainingFraction) -> dict[str, float]:
        """β in effect; under "auto" of each pair: `beta[group0=group0]`."""
        if not self.is_auto:
            return super().weights(progress)
        factor = float(self.weight(progress))
        return {
            f"beta[{name}]": beta * factor
            for name, beta in zip(self.pair_names, self.recorded, strict=True)
        }

    def describe(
        self, pairs: Pairs, student: Sequence[Tensor], teacher: Sequence[Tensor | StoredMap]
    ) -> list[str]:
        """A line a pair: layers, sizes, and the effective weight of β under the conventions."""
        conventions = ["paper"] if self.options.convention == "paper" else ["authors", "caffe"]
        lines = []
        pair_betas = self._pair_betas(student, teacher)
        for j, ((s, t), fs, ft) in enumerate(zip(pairs, student, teacher, strict=True)):
            positions = maps.map_positions(fs, ft, self.options)
            betas = []
            for convention in conventions:
                converted = maps.convert_beta(
                    pair_betas[j], self.options.convention, convention, positions
                )
                betas.append(f"{converted:.5g} ({convention})")
            kept = " a map" * isinstance(ft, StoredMap)
            sizes = f"{tuple(fs.shape[1:])} and{kept} {tuple(ft.shape[1:])}"
            line = f"{s} ← {t}: {sizes}, M = {positions}, β = {', '.join(betas)}"
            if j in self.left_out:
                line += f"; left out: {self.left_out[j]}"
            lines.append(line)
        return lines

    def warnings(self, steps: int) -> list[str]:
        # The mean of β over the schedule, at 21 points.
        factors = [float(schedule_factor(self.decay, k / 20)) for k in range(21)]
        mean = self.beta * sum(factors) / len(factors)
        if self.is_auto or self.options.convention != "authors" or mean <= HEAVY_BETA * steps:
            return []
        # One significant digit: the advice is no more exact than that.
        good = float(f"{GOOD_BETA * steps:.1g}")
        return [f"β = {self.beta:g} is likely too heavy for {steps} steps: try --beta {good:g}"]
