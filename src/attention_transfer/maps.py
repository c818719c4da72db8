"""Attention maps of activations and the loss over pairs of layers.

Shapes: N batch, C channels, H and W spatial size, M = H·W positions, L tokens, D their width.
Formulas: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, 3.1 and Eq. 2.
"""

from __future__ import annotations

import functools
import math
from typing import Any, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import check_finite, check_floats, check_same_device, check_switch, check_weight
from .errors import UserError, check_choice, shown
from .map_inputs import (
    Features,
    PairWeights,
    StoredMap,
    TeacherFeatures,
    check_attention,
    pair_features,
)
from .map_options import Convention, LossOptions, MapOptions
from .numerics import EPS, at_least_float32, power
from .ops import activation_loss
from .options import checked

Options = TypeVar("Options", bound=MapOptions)


def attention_map(
    features: Tensor, kind: str = "sum", p: float = 2.0, normalize: bool = True, axis: str = "space"
) -> Tensor:
    """The attention map Q of activations, or Y = Q / max(‖Q‖₂, 1e-12) if `normalize` is true.

    `sum`: Q[n,m] = Σ_c |A[n,c,m]|^p; `max`: max_c |A[n,c,m]|^p (the paper's F_sum^p, F_max^p).
    `attention`: mean_h A[n,h,m] of the attention A that `tap(..., attention=True)` reads, without p
    (Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021).

    Args:
        features: A, (N, C, H, W), or tokens (N, L, D) without prefix tokens; for `attention`
            (N, heads, H, W).
        kind: `sum`, `max` or `attention`.
        p: the exponent, p ≥ 1.
        normalize: divide by the l2 norm of each sample; a zero sample and its gradient stay zero.
        axis: `space`, a map over positions, or `channel`, a map over channels.

    Returns:
        (N, H·W), or (N, L) for tokens; with `axis="channel"` (N, C) or (N, D). float32, or float64
        for float64.

    Raises:
        UserError: (a ValueError) for a wrong shape, dtype, kind, p or axis; in eager mode on a CPU
            also for features that are not finite, or whose |A|^p is not.
    """
    options = make_options(MapOptions, kind, p, axis)
    q = _raw_map(checked_features(features, "features"), options)
    if check_switch(normalize, "normalize"):
        q = normalize_map(q)
    if not torch.compiler.is_compiling():
        check_finite(q, {"features": features}, _overflow("features", options.p))
    return q


def at_loss(
    student: Features,
    teacher: Features,
    *,
    kind: str = "sum",
    p: float = 2.0,
    convention: str = "authors",
    resize: str = "map",
    norm: float = 2.0,
    axis: str = "space",
    weights: PairWeights | None = None,
    teacher_kind: str | None = None,
) -> Tensor:
    """The attention transfer loss, summed over pairs of layers; D = Y_student − Y_teacher.

    `authors`: mean over N and M of D² (as their PyTorch code; β = 1000 belongs to it).
    `paper`: ½ · mean over N of ‖D‖, not squared (Eq. 2).
    `caffe`: 1/(2N) · Σ D² (EuclideanLoss); `authors` = (2/M) · `caffe`.

    Args:
        student: the student's features, (N, C, H, W) or (N, L, D): one tensor, a list, or a dict.
        teacher: the teacher's features, in the same structure. Channels need not match.
        kind, p, axis: as in `attention_map`.
        convention: `authors`, `paper` or `caffe`.
        resize: how maps of different H×W are resized to (min H, min W): `map` average-pools the map
            before it is normalised, `features` average-pools the features, `bilinear` interpolates
            the map (antialiased).
        norm: the order of ‖D‖ under `paper`, norm ≥ 1 or `math.inf`.
        weights: a factor for each pair, a list or a dict like the features; by default 1.
        teacher_kind: the kind of the teacher's maps, such as `attention`; by default `kind`.

    Returns:
        A scalar, float32 or float64.

    Raises:
        UserError: (a ValueError) for features that cannot be paired, and for wrong options; in
            eager mode on a CPU also for features that are not finite, or whose |A|^p is not.
    """
    options = make_options(LossOptions, kind, p, axis, convention, resize, norm, teacher_kind)
    total = map_loss(student, teacher, options, weights)
    inputs: dict[str, Tensor] = {}
    for name, s, t, _ in pair_features(student, teacher, None):
        inputs[f"student features of {name}"] = s
        inputs[f"teacher features of {name}"] = t.values if isinstance(t, StoredMap) else t
    # A compiler cannot trace the number in the message.
    if not torch.compiler.is_compiling():
        check_finite(total, inputs, _overflow("features", options.p))
    return total


def _overflow(name: str, p: float) -> str:
    return f"{name}: |A|^p overflows at p = {p:g}: expected smaller values, or a smaller p"


def map_loss(
    student: Features,
    teacher: TeacherFeatures,
    options: LossOptions,
    weights: PairWeights | None = None,
) -> Tensor:
    """`at_loss` with options that are checked already; `teacher` may contain `StoredMap`s."""
    return functools.reduce(torch.add, pair_losses(student, teacher, options, weights))


def pair_losses(
    student: Features,
    teacher: TeacherFeatures,
    options: LossOptions,
    weights: PairWeights | None = None,
) -> list[Tensor]:
    """The terms of `map_loss`, a scalar for each pair."""
    terms = []
    for name, s, t, weight in pair_features(student, teacher, weights):
        term = map_distance(*paired_maps(s, t, options, name), options)
        if weight != 1.0:  # the default needs no operation
            term = term * weight
        terms.append(term)
    if not terms:
        raise UserError("no pair of features: expected at least one")
    return terms


def make_options(cls: type[Options], *values: Any) -> Options:
    """Checked options from the values of their fields.

    Raises:
        UserError: for a wrong value.
    """
    if not torch.compiler.is_compiling():
        try:
            return _cached_options(cls, *values)  # type: ignore[arg-type]  # python/mypy#11470
        except TypeError:  # an unhashable value
            return checked(cls(*values))
    # Dynamo cannot trace pydantic. An unknown string raises where it is used.
    options = cls(*values)
    for key in ("p", "norm"):
        # Not `< 1`, which is false for NaN.
        if not getattr(options, key, 1.0) >= 1:
            raise UserError(f"{key} is {getattr(options, key)!r}: expected a number ≥ 1")
    return options


# A check by pydantic takes longer than the loss of a small pair. `typed`, because 1 == True.
@functools.lru_cache(typed=True)
def _cached_options(cls: type[Options], *values: Any) -> Options:
    return checked(cls(*values))


def paired_maps(
    student: Tensor, teacher: Tensor | StoredMap, options: LossOptions, name: str = "pair"
) -> tuple[Tensor, Tensor]:
    """The normalised maps of one pair, resized to the same size: two tensors (N, M)."""
    teacher_options, stored = options.of_teacher, isinstance(teacher, StoredMap)
    if isinstance(teacher, StoredMap):
        # The scale of a stored map does not matter: resizing is linear, the result is normalised.
        teacher = teacher.as_features()
        teacher_options = LossOptions("sum", 1.0, options.axis, resize=options.resize)
    student = checked_features(student, f"student features of {name}")
    teacher = checked_features(teacher, f"teacher features of {name}")
    check_same_device(student, f"{name}: the student", teacher, "the teacher")
    if student.shape[0] != teacher.shape[0]:
        raise UserError(
            f"{name}: the student's batch is {student.shape[0]}, the teacher's {teacher.shape[0]}: "
            "expected the same images"
        )
    # A map over channels does not depend on H×W.
    size = None
    if options.axis != "channel" and _grid(student) != _grid(teacher):
        size = common_grid(student, teacher, name)
    if stored and size is not None and options.resize == "features":
        raise UserError(
            f"{name}: resize='features' pools the teacher's features, but a store has only maps: "
            "choose resize='map' or 'bilinear'"
        )
    ys, yt = _map_at(student, options, size), _map_at(teacher, teacher_options, size)
    if ys.shape != yt.shape:
        raise UserError(
            f"{name}: axis='channel' compares channel by channel, but the student has "
            f"{ys.shape[1]} channels and the teacher {yt.shape[1]}: use axis='space', "
            "whose map does not depend on the number of channels"
        )
    return ys, yt


def _map_at(features: Tensor, options: LossOptions, size: tuple[int, int] | None) -> Tensor:
    """The normalised map (N, M), resized to `size` if it is given."""
    if size is None:
        return normalize_map(_raw_map(features, options))
    if options.resize == "features":
        # The pooled features are new tensors, which backward keeps in addition to the originals.
        pooled = F.adaptive_avg_pool2d(as_grid(at_least_float32(features)), size)
        return normalize_map(_raw_map(pooled, options))
    q = _raw_map(features, options).unflatten(1, (1, *_grid(features)))
    return normalize_map(_resize_map(q, size, options.resize).flatten(1))


def map_distance(student: Tensor, teacher: Tensor, options: LossOptions) -> Tensor:
    """The loss of one pair of normalised maps (N, M) under a convention: a scalar."""
    d = student - teacher
    if options.convention == "authors":
        return d.square().mean()
    if options.convention == "caffe":
        return d.square().sum() / (2 * d.shape[0])
    if options.convention == "paper":
        return row_norm(d, options.norm).mean() / 2
    raise UserError(f"unknown convention {options.convention!r}")


def normalize_map(q: Tensor) -> Tensor:
    """Y = Q / max(‖Q‖₂, 1e-12), row by row, in at least float32: (N, M) -> (N, M).

    For a zero row the formula has zero gradients of every order (the norm itself would have 0/0 in
    the second). Q is scaled because squares of Q > 1e19 (p = 4 and |A| > 6e4) overflow in float32.
    Y does not depend on the scale, so it is a constant for the gradients.
    """
    q = at_least_float32(q)
    if not _is_traced():
        return activation_loss.Normalize.apply(q)[0]
    scale = q.detach().abs().amax(1, keepdim=True).clamp_min(EPS)
    q, bound = q / scale, EPS / scale
    squared = q.square().sum(1, keepdim=True)
    above = squared > bound.square()
    # The inner `where` keeps zeros from the root, whose infinite derivative would give NaN.
    return q / torch.where(above, torch.where(above, squared, 1.0).sqrt(), bound)


def row_norm(d: Tensor, order: float = 2.0) -> Tensor:
    """‖d_n‖ of each row, (N, M) -> (N,), whose gradient at d_n = 0 is 0 and not NaN."""
    if order == math.inf:
        return d.abs().amax(1)
    if order == 1:
        return d.abs().sum(1)
    scale = None
    if order != 2:
        # D is at most 1, so its high powers underflow. ‖D‖ = s·‖D/s‖ with a constant s.
        scale = d.detach().abs().amax(1, keepdim=True).clamp_min(EPS)
        d = d / scale
    total = power(d, order).sum(1)
    zero = total == 0
    # The root of a zero row would have an infinite derivative, even if `where` discards its value.
    safe = torch.where(zero, 1.0, total)
    root = safe.sqrt() if order == 2 else safe.pow(1 / order)
    length = torch.where(zero, 0.0, root)
    if scale is None:
        return length
    return length * scale.squeeze(1)


def convert_beta(beta: float, source: str, target: str, positions: int) -> float:
    """β of one pair under the convention `target` with the loss that `beta` has under `source`.

    `positions` is M, the number of positions (H·W) of the pair's maps. `authors` = (2/M) · `caffe`;
    `paper` takes the root, so no constant factor converts it to another convention.

    Raises:
        UserError: for `paper`, an unknown convention, and wrong numbers.
    """
    beta = check_weight(beta, "beta")
    if not isinstance(positions, int) or positions < 1:
        raise UserError(f"positions is {shown(positions)}: expected a whole number ≥ 1")
    for name, convention in (("source", source), ("target", target)):
        check_choice(f"{name} convention", convention, get_args(Convention))
    if source == target:
        return beta
    if "paper" in (source, target):
        raise UserError(
            "no β makes 'paper' equal another convention, because it uses ‖D‖ and the others "
            "‖D‖²: tune β again"
        )
    if target == "caffe":
        return beta * 2 / positions
    return beta * positions / 2


def checked_features(features: Tensor, name: str) -> Tensor:
    """The features, unchanged.

    Raises:
        UserError: for features without a map.
    """
    expected = "(N, C, H, W) or (N, L, D)"
    check_floats(features, name, expected)
    if features.ndim not in (3, 4):
        raise UserError(f"{name}: got shape {tuple(features.shape)}, expected {expected}")
    return features


def _is_traced() -> bool:
    """Whether to use the formulas of this file instead of `ops/activation_loss.py`.

    A compiler fuses them, and cannot trace a Function that has a jvp. Under `torch.func` a jvp of a
    jvp through any Function is silently wrong (pytorch/pytorch#197867). The choice is the same for
    student and teacher, with or without a gradient: equal features must give equal maps to the last
    bit, because the gradient of ‖D‖ does not shrink with D.
    """
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _raw_map(features: Tensor, options: MapOptions) -> Tensor:
    """Q in at least float32: (N, H·W) or (N, L); with `axis="channel"` (N, C) or (N, D)."""
    if options.kind == "attention":
        check_attention(features, options.axis)
        return at_least_float32(features).mean(1).flatten(1)
    if not _is_traced():
        return activation_loss.raw_map(features, options.kind, options.p, options.axis)
    features, dim = activation_loss.reduction_view(at_least_float32(features), options.axis)
    if options.kind == "sum":
        return power(features, options.p).sum(dim).flatten(1)
    if options.kind == "max":
        return power(features.abs().max(dim).values, options.p).flatten(1)
    raise UserError(f"unknown kind {options.kind!r}")


def _grid(features: Tensor) -> tuple[int, int]:
    """(H, W). Tokens are a square grid if their number is a square, otherwise a single row."""
    if features.ndim == 4:
        return features.shape[2], features.shape[3]
    side = math.isqrt(features.shape[1])
    if side * side == features.shape[1]:
        return side, side
    return 1, features.shape[1]


def as_grid(features: Tensor) -> Tensor:
    """(N, C, H, W) unchanged, (N, L, D) as (N, D, H, W)."""
    if features.ndim == 4:
        return features
    return features.transpose(1, 2).unflatten(2, _grid(features))


def common_grid(student: Tensor, teacher: Tensor, name: str) -> tuple[int, int]:
    """(min H, min W) of two features.

    Raises:
        UserError: for tokens that are no square grid.
    """
    for features, other in ((student, teacher), (teacher, student)):
        if features.ndim == 3 and math.isqrt(features.shape[1]) ** 2 != features.shape[1]:
            raise UserError(
                f"{name}: {features.shape[1]} tokens are no square grid, so they cannot be resized "
                f"to the other side's {_grid(other)}: reshape them to (N, D, H, W) first"
            )
    (hs, ws), (ht, wt) = _grid(student), _grid(teacher)
    return min(hs, ht), min(ws, wt)


def _resize_map(q: Tensor, size: tuple[int, int], resize: str) -> Tensor:
    if tuple(q.shape[2:]) == size:
        return q
    if resize == "map":
        return F.adaptive_avg_pool2d(q, size)
    if resize == "bilinear":
        return F.interpolate(q, size, mode="bilinear", align_corners=False, antialias=True)
    raise UserError(f"unknown resize {resize!r}")
