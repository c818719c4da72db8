"""The inputs of the loss over attention maps: features or stored maps, paired by order or name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import check_weight
from .errors import UserError, shown


class StoredMap(NamedTuple):
    """A normalised map from a store, instead of the teacher's features.

    `values` are (N, H, W), or (N, C) for a map over channels.
    """

    values: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def as_features(self) -> Tensor:
        """Features (N, 1, H, W), or (N, C, 1, 1), whose map of kind `sum` at p = 1 is this map."""
        if self.values.ndim == 2:
            return self.values[:, :, None, None]
        return self.values.unsqueeze(1)


def check_attention(features: Tensor, axis: str) -> None:
    """Raises `UserError` unless the features are attention (N, heads, H, W), over positions."""
    if features.ndim != 4:
        raise UserError(
            f"kind='attention' got features {tuple(features.shape)}: expected attention "
            "(N, heads, H, W), as tap(model, layers, attention=True) reads it"
        )
    if axis == "channel":
        raise UserError("kind='attention' is a map over positions: choose axis='space'")


Features = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
TeacherFeatures = Features | Sequence[Tensor | StoredMap] | Mapping[str, Tensor | StoredMap]
PairWeights = Sequence[float] | Mapping[str, float]


def pair_features(
    student: Features, teacher: TeacherFeatures, weights: PairWeights | None
) -> list[tuple[str, Tensor, Tensor | StoredMap, float]]:
    """(name, student features, teacher features, weight) of each pair."""
    if isinstance(student, Tensor) and isinstance(teacher, Tensor):
        student, teacher = [student], [teacher]
    if isinstance(student, Mapping) and isinstance(teacher, Mapping):
        return _pair_by_name(student, teacher, weights)
    if not isinstance(student, (list, tuple)) or not isinstance(teacher, (list, tuple)):
        raise UserError(
            f"student features are a {type(student).__name__}, the teacher's a "
            f"{type(teacher).__name__}: expected both a tensor, both a list, or both a dict"
        )
    if len(student) != len(teacher):
        raise UserError(
            f"{len(student)} student features but {len(teacher)} of the teacher's: "
            "expected equal numbers"
        )
    factors: Sequence[float] = [1.0] * len(student)
    if weights is not None:
        if not isinstance(weights, (list, tuple)) or len(weights) != len(student):
            raise UserError(
                f"weights is {shown(weights)}: expected a list of {len(student)} numbers, "
                "one for each pair"
            )
        factors = [check_weight(weight, "weights") for weight in weights]
    names = [f"pair {j}" for j in range(len(student))]
    return list(zip(names, student, teacher, factors, strict=True))


def _pair_by_name(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor | StoredMap],
    weights: PairWeights | None,
) -> list[tuple[str, Tensor, Tensor | StoredMap, float]]:
    if student.keys() != teacher.keys():
        raise UserError(
            f"the student's layers are {list(student)}, the teacher's {list(teacher)}: "
            "expected the same keys"
        )
    if weights is None:
        weights = dict.fromkeys(student, 1.0)
    if not isinstance(weights, Mapping):
        raise UserError(
            f"weights is {shown(weights)}, but the features are a dict: "
            "expected a dict with the same keys"
        )
    if weights.keys() != student.keys():
        raise UserError(
            f"weights has {list(weights)}, the features {list(student)}: expected the same keys"
        )
    factors = {name: check_weight(weight, "weights") for name, weight in weights.items()}
    return [(name, student[name], teacher[name], factors[name]) for name in student]
