"""Activation-based attention transfer: β · Σ over pairs of the distance between normalised attention maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from .. import maps
from ..errors import UserError
from .base import BetaMethod, StepInputs, check_weight, decayed

# As shares of the number of steps: a β (under `authors`, its mean over a schedule) above the first was too heavy where
# it was tried (1000 in 280 to 370 steps, constant or linear to zero), one of the second did well (100 there).
HEAVY_BETA = 0.5
GOOD_BETA = 0.25


class ActivationTransfer(BetaMethod):
    """β · `at_loss` (Eq. 2 of the paper, or the authors' code: see `convention`).

    Args:
        beta: β; 1000 goes with `authors`. A run of a few hundred steps wants less (100).
        kind, p, convention, resize, norm, axis, weights: as in `at_loss`.
        decay: `constant`, `linear` or `cosine` (both to zero), `step` (×0.2 at 30, 60 and 80 % of the training), or
            `warm-up` (from zero over the first tenth), alone or before one of them (`warm-up+linear`).

    Raises:
        UserError: (a ValueError) for a wrong option.
    """

    name = "at"
    part = "at"
    needs_teacher = True
    needs_features = True
    beside = {
        "kd": {"decay": "linear"}
    }  # the paper decays β when attention transfer goes along with distillation

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
        maps.check_loss_options(kind, p, convention, resize, norm, axis)
        self.options: maps.LossOptions = {
            "kind": kind,
            "p": p,
            "convention": convention,
            "resize": resize,
            "norm": norm,
            "axis": axis,
        }
        if weights is not None and (
            isinstance(weights, (str, Mapping)) or not isinstance(weights, Iterable)
        ):
            raise UserError(f"weights is {weights!r}: expected a list of numbers, one a pair")
        self.pair_weights = (
            None if weights is None else [check_weight("weights", w) for w in weights]
        )

    def forward(self, step: StepInputs) -> Tensor:
        return maps.at_loss(
            step.student_features, step.teacher_features, weights=self.pair_weights, **self.options
        )

    def prepare(
        self, pairs: Sequence[tuple[str, str]], student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> None:
        if self.pair_weights is not None and len(self.pair_weights) != len(pairs):
            raise UserError(
                f"weights has {len(self.pair_weights)} numbers for {len(pairs)} pairs: expected one a pair"
            )
        names = [f"pair {j} ({s} ← {t})" for j, (s, t) in enumerate(pairs)]
        maps.at_loss(
            dict(zip(names, student, strict=True)),
            dict(zip(names, teacher, strict=True)),
            **self.options,
        )

    def describe(
        self, pairs: Sequence[tuple[str, str]], student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> list[str]:
        """A line for each pair: layers, sizes, and the effective weight of β under the conventions."""
        lines = []
        for j, ((s, t), fs, ft) in enumerate(zip(pairs, student, teacher, strict=True)):
            beta = self.beta * (1.0 if self.pair_weights is None else self.pair_weights[j])
            sizes = f"{tuple(fs.shape[1:])} and {tuple(ft.shape[1:])}"
            ys, _ = maps.paired_maps(
                fs,
                ft,
                kind=self.options["kind"],
                p=self.options["p"],
                resize=self.options["resize"],
                axis=self.options["axis"],
            )
            convention = self.options["convention"]
            names = [c for c in ("authors", "caffe") if convention != "paper"] or ["paper"]
            weight = ", ".join(
                f"{maps.convert_beta(beta, convention, c, ys.shape[1]):.5g} ({c})" for c in names
            )
            lines.append(f"{s} ← {t}: {sizes}, M = {ys.shape[1]}, β = {weight}")
        return lines

    def advise(self, steps: int) -> list[str]:
        mean = self.beta * sum(float(decayed(self.decay, k / 20)) for k in range(21)) / 21
        if self.options["convention"] != "authors" or mean <= HEAVY_BETA * steps:
            return []
        good = float(f"{GOOD_BETA * steps:.1g}")
        return [f"β = {self.beta:g} is likely too heavy for {steps} steps: try --beta {good:g}"]
