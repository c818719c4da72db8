"""Activation-based attention transfer: β · Σ over pairs of the distance between normalised maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from .. import maps
from ..arguments import check_weight
from ..errors import UserError, shown
from ..map_inputs import StoredMap
from ..map_options import LossOptions, MapOptions
from ..options import AUTO, subset
from .auto import PairedBetaMethod
from .base import Pairs, StepInputs, StudentLayers, TeacherLayers, schedule_factor

# β per step of training. A β above HEAVY_BETA · steps (under `authors`, mean over the schedule) was
# too large in short runs (results/defaults.md: 1000 in 280 to 370 steps); GOOD_BETA · steps worked
# well (100 in these runs).
HEAVY_BETA = 0.5
GOOD_BETA = 0.25


class ActivationTransfer(PairedBetaMethod):
    """β · `at_loss` (Eq. 2 of the paper, or the authors' code: see `convention`).

    Args:
        beta: β under `convention`; the paper's 1000 suits `authors` and tens of thousands of
            steps. With "auto" the term is 3 · Σ ½‖D‖² / Σ ½‖Y_teacher − its mean over images‖²,
            both sums over the pairs, so it does not depend on the sizes of the maps (under `paper`
            the norms are not squared). The means are over `Transfer`'s example: use about 32
            training images. A pair that cannot teach is left out.
        kind, p, convention, resize, norm, axis, weights: as in `at_loss`.
        decay: `constant`, `linear` or `cosine` (both to zero), `step` (×0.2 at 30, 60 and 80 % of
            the training), or `warm-up` (from zero over the first tenth), alone or before a fall
            (`warm-up+linear`).
        teacher_kind: the kind of the teacher's maps, if it differs from `kind`. "attention" is the
            class token's attention in a transformer's block; `kind="attention"` reads it from the
            student as well; see `tap`.

    Raises:
        UserError: (a ValueError) for a wrong option.
    """

    name = "at"
    needs_teacher = True
    needs_features = True
    # In the paper, β decays if attention transfer is combined with distillation.
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
        teacher_kind: str | None = None,
    ):
        super().__init__(beta, decay)
        self.options = maps.make_options(
            LossOptions, kind, p, axis, convention, resize, norm, teacher_kind
        )
        self.map_options = subset(self.options.of_teacher, MapOptions)
        self.reads_attention = self.options.reads_attention, self.map_options.reads_attention
        self.pair_weights: list[float] | None = None
        if weights is not None:
            unordered_or_text = isinstance(weights, (str, bytes, Mapping, Tensor))
            if unordered_or_text or not isinstance(weights, Iterable):
                raise UserError(
                    f"weights is {shown(weights)}: expected a list with a number for each pair"
                )
            self.pair_weights = [check_weight(w, "weights") for w in weights]

    def forward(self, step: StepInputs) -> Tensor:
        terms = maps.pair_losses(
            step.student_features, step.teacher_features, self.options, self.pair_betas()
        )
        step.pair_terms[self.name] = [term.detach() for term in terms]
        return reduce(torch.add, terms)

    def pair_betas(self) -> list[float] | None:
        return self._auto_betas if self.is_auto else self.pair_weights

    def prepare(self, pairs: Pairs, student: StudentLayers, teacher: TeacherLayers) -> None:
        if self.pair_weights is not None and len(self.pair_weights) != len(pairs):
            raise UserError(
                f"weights has {len(self.pair_weights)} numbers for {len(pairs)} pairs: "
                "expected one for each pair"
            )
        if not pairs:
            raise UserError("no pair of features: expected at least one")
        teacher_maps = []
        for j, ((s, t), fs, ft) in enumerate(zip(pairs, student, teacher, strict=True)):
            _, y = maps.paired_maps(fs, ft, self.options, f"pair {j} ({s} ← {t})")
            teacher_maps.append(y.cpu().double())  # MPS has no float64
        if self.is_auto:
            spreads = [self._spread(y) for y in teacher_maps]
            self.set_auto_betas(pairs, student, spreads, self._units(teacher_maps))

    def _units(self, teacher_maps: list[Tensor]) -> list[float]:
        """The β of each pair for which its term is ½‖D‖², or ½‖D‖ under `paper`."""
        units = self.pair_weights or [1.0] * len(teacher_maps)
        convention = self.options.convention
        if convention == "paper":
            return units
        return [
            maps.convert_beta(unit, "caffe", convention, y.shape[1])
            for unit, y in zip(units, teacher_maps, strict=True)
        ]

    def _spread(self, y: Tensor) -> float:
        """The distance of the teacher's maps (N, M) from their mean over the images, unbiased."""
        options = self.options
        # The spread is a mean of ½‖·‖², the convention `caffe`, which does not depend on M.
        if options.convention == "authors":
            options = replace(options, convention="caffe")
        distance = float(maps.map_distance(y, y.mean(0).expand_as(y), options))
        freedom = max(1, len(y) - 1) / len(y)
        if options.convention == "paper":
            return distance / freedom**0.5
        return distance / freedom

    def describe(self, pairs: Pairs, student: StudentLayers, teacher: TeacherLayers) -> list[str]:
        """A line for each pair: layers, sizes, and the effective weight under the conventions."""
        conventions = ["paper"] if self.options.convention == "paper" else ["authors", "caffe"]
        lines = []
        factors = self.pair_betas() or [1.0] * len(pairs)
        for j, ((s, t), fs, ft) in enumerate(zip(pairs, student, teacher, strict=True)):
            beta = self.beta * factors[j]
            positions = maps.paired_maps(fs, ft, self.options)[0].shape[1]
            betas = []
            for convention in conventions:
                converted = maps.convert_beta(beta, self.options.convention, convention, positions)
                betas.append(f"{converted:.5g} ({convention})")
            stored = " a map" * isinstance(ft, StoredMap)
            sizes = f"{tuple(fs.shape[1:])} and{stored} {tuple(ft.shape[1:])}"
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
        # One significant digit, because the advice is only approximate.
        good = float(f"{GOOD_BETA * steps:.1g}")
        return [f"β = {self.beta:g} is probably too large for {steps} steps: try --beta {good:g}"]
