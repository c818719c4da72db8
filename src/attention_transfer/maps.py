"""Attention maps of activations and the loss over pairs of layers.

Shapes: N batch, C channels, H and W spatial size, M = H·W positions, L tokens, D their width.
Formulas: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, section 3.1 and Eq. 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError, check_choice
from .ops import activation_loss
from .ops.activation_loss import EPS, power, wide

KINDS = ("sum", "max")
AXES = ("space", "channel")
CONVENTIONS = ("authors", "paper", "caffe")
RESIZES = ("map", "features", "bilinear")

Features = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


class LossOptions(TypedDict):
    """The options of `at_loss`, other than the weights of the pairs."""

    kind: str
    p: float
    convention: str
    resize: str
    norm: float
    axis: str


def attention_map(
    features: Tensor, kind: str = "sum", p: float = 2.0, normalize: bool = True, axis: str = "space"
) -> Tensor:
    """The attention map Q of activations, or Y = Q / max(‖Q‖₂, 1e-12) where `normalize` is true.

    `sum`: Q[n,m] = Σ_c |A[n,c,m]|^p; `max`: max_c |A[n,c,m]|^p (the paper's F_sum, F_sum^p, F_max^p).

    Args:
        features: A, (N, C, H, W), or tokens (N, L, D) without prefix tokens.
        kind: `sum` or `max`.
        p: the exponent, p ≥ 1.
        normalize: divide by the l2 norm of each sample; an all-zero sample stays zero, with zero gradient.
        axis: `space`, a map over positions, or `channel`, a map over channels that is reduced over positions.

    Returns:
        (N, H·W), or (N, L) for tokens; with `axis="channel"` (N, C) or (N, D). float32, or float64 for float64.

    Raises:
        UserError: (a ValueError) for a wrong shape, dtype, kind, p or axis.
    """
    check_map_options(kind, p, axis)
    q = _reduce(checked(features, "features"), kind, p, axis)
    return normalize_map(q) if normalize else q


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
    weights: Sequence[float] | Mapping[str, float] | None = None,
) -> Tensor:
    """The attention transfer loss, summed over pairs of layers; D = Y_student − Y_teacher.

    `authors`: mean over N and M of D² (their PyTorch code; β = 1000 goes with it). `paper`: ½ · mean over N of ‖D‖,
    not squared (Eq. 2). `caffe`: 1/(2N) · Σ D² (EuclideanLoss). `authors` = (2/M) · `caffe`.

    Args:
        student: the student's features, (N, C, H, W) or (N, L, D): one tensor, a list, or a dict of them.
        teacher: the teacher's, of the same structure. Channels need not match.
        kind, p, axis: as in `attention_map`.
        convention: `authors`, `paper` or `caffe`.
        resize: what happens where H×W differ. The target is (min H, min W): `map` average-pools the map before it is
            normalised, `features` average-pools the features, `bilinear` interpolates the map (antialiased).
        norm: the order of ‖D‖ under `paper`, norm ≥ 1 or `math.inf`.
        weights: a factor for each pair, a list or a dict like the features; 1 where not given.

    Returns:
        A scalar, float32 or float64.

    Raises:
        UserError: (a ValueError) for features that do not pair, and for wrong options.
    """
    check_loss_options(kind, p, convention, resize, norm, axis)
    total: Tensor | None = None
    for name, s, t, weight in _pairs(student, teacher, weights):
        ys, yt = paired_maps(s, t, kind=kind, p=p, resize=resize, axis=axis, name=name)
        term = map_distance(ys, yt, convention, norm)
        if weight != 1.0:
            term = term * weight
        total = term if total is None else total + term
    if total is None:
        raise UserError("at_loss got no pair of features: expected at least one")
    return total


def paired_maps(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str,
    p: float,
    resize: str,
    axis: str,
    name: str = "pair",
) -> tuple[Tensor, Tensor]:
    """The normalised maps of one pair, brought to one size: two tensors (N, M)."""
    student, teacher = (
        checked(student, f"student features of {name}"),
        checked(teacher, f"teacher features of {name}"),
    )
    if student.shape[0] != teacher.shape[0]:
        raise UserError(
            f"{name}: the student's batch is {student.shape[0]}, the teacher's {teacher.shape[0]}: expected the "
            "same images"
        )
    if axis == "channel":
        qs, qt = _reduce(student, kind, p, axis), _reduce(teacher, kind, p, axis)
        if qs.shape != qt.shape:
            raise UserError(
                f"{name}: axis='channel' compares channel by channel, but the student has {qs.shape[1]} channels and "
                f"the teacher {qt.shape[1]}: use axis='space', whose map does not depend on the number of channels"
            )
        return normalize_map(qs), normalize_map(qt)
    if resize == "features" and _grid(student) != _grid(teacher):
        size = common_grid(student, teacher, name)
        # Pooled features are new features: they are what is kept for backward, beside those that came.
        student, teacher = (
            F.adaptive_avg_pool2d(as_grid(wide(f)), size) for f in (student, teacher)
        )
    qs, qt = _reduce(student, kind, p, axis), _reduce(teacher, kind, p, axis)
    if _grid(student) != _grid(teacher):
        size = common_grid(student, teacher, name)
        qs, qt = (
            _resize_map(q.unflatten(1, (1, *_grid(f))), size, resize).flatten(1)
            for q, f in ((qs, student), (qt, teacher))
        )
    return normalize_map(qs), normalize_map(qt)


def map_distance(student: Tensor, teacher: Tensor, convention: str, norm: float = 2.0) -> Tensor:
    """The loss of one pair of normalised maps (N, M) under a convention: a scalar."""
    d = student - teacher
    if convention == "authors":
        return d.square().mean()
    if convention == "caffe":
        return d.square().sum() / (2 * d.shape[0])
    return row_norm(d, norm).mean() / 2


def normalize_map(q: Tensor) -> Tensor:
    """Y = Q / max(‖Q‖₂, 1e-12), row by row, in at least float32: (N, M) -> (N, M).

    Written so that the gradients of a zero row are zero at every order (the norm's own would be 0/0 at the second), and
    scaled, or squares of Q > 1e19 (p = 4 and |A| > 6e4) overflow in float32. Y does not depend on the scale: it is a
    constant to the gradients.
    """
    q = wide(q)
    if not _is_traced():
        return activation_loss.normalized(q)
    scale = q.detach().abs().amax(1, keepdim=True).clamp_min(EPS)
    q, bound = q / scale, EPS / scale
    squared = q.square().sum(1, keepdim=True)
    above = squared > bound.square()
    return q / torch.where(above, torch.where(above, squared, 1.0).sqrt(), bound)


def row_norm(d: Tensor, order: float = 2.0) -> Tensor:
    """‖d_n‖ of each row, (N, M) -> (N,), whose gradient at d_n = 0 is 0 and not NaN."""
    if order == math.inf:
        return d.abs().amax(1)
    if order == 1:
        return d.abs().sum(1)
    scale = None
    if order != 2:
        # As D is at most 1, its power underflows where the order is high. ‖D‖ = s·‖D/s‖: a constant to the gradients.
        scale = d.detach().abs().amax(1, keepdim=True).clamp_min(EPS)
        d = d / scale
    total = power(d, order).sum(1)
    positive = total > 0
    safe = torch.where(positive, total, 1.0)
    length = torch.where(positive, safe.sqrt() if order == 2 else safe.pow(1 / order), 0.0)
    return length if scale is None else length * scale.squeeze(1)


def convert_beta(beta: float, source: str, target: str, positions: int) -> float:
    """β of one pair with M = `positions` under another convention with the same loss.

    Only `authors` and `caffe` are multiples of one another (`authors` = (2/M) · `caffe`); `paper` takes the root, so no
    constant factor leads there.

    Raises:
        UserError: for `paper`, and for an unknown convention.
    """
    for convention in (source, target):
        check_choice("convention", convention, CONVENTIONS)
    if source == target:
        return float(beta)
    if "paper" in (source, target):
        raise UserError(
            "no β makes 'paper' equal another convention: it takes ‖D‖, the others ‖D‖²; tune β there anew"
        )
    return beta * 2 / positions if target == "caffe" else beta * positions / 2


def check_map_options(kind: str, p: float, axis: str) -> None:
    """Raises `UserError` for a kind, exponent or axis that has no map."""
    check_choice("kind of attention map", kind, KINDS)
    check_choice("axis", axis, AXES)
    if not (isinstance(p, (int, float)) and 1 <= p < math.inf):
        raise UserError(
            f"p is {p!r}: expected a number p ≥ 1 (below 1 the gradient at 0 does not exist)"
        )


def check_loss_options(
    kind: str, p: float, convention: str, resize: str, norm: float, axis: str
) -> None:
    """Raises `UserError` for an option of `at_loss` that is not one."""
    check_map_options(kind, p, axis)
    check_choice("convention", convention, CONVENTIONS)
    check_choice("resize", resize, RESIZES)
    if not (isinstance(norm, (int, float)) and norm >= 1):
        raise UserError(f"norm is {norm!r}: expected a number norm ≥ 1, or math.inf")


def checked(features: Tensor, what: str) -> Tensor:
    """The features as they came, if they have a map."""
    if not isinstance(features, Tensor):
        raise UserError(
            f"{what}: got {type(features).__name__}, expected a tensor (N, C, H, W) or (N, L, D)"
        )
    if features.ndim not in (3, 4):
        raise UserError(
            f"{what}: got shape {tuple(features.shape)}, expected (N, C, H, W) or (N, L, D)"
        )
    if not features.is_floating_point():
        raise UserError(f"{what}: got {features.dtype}, expected a floating-point tensor")
    if 0 in features.shape:
        raise UserError(f"{what}: got the empty shape {tuple(features.shape)}")
    return features


def _is_traced() -> bool:
    """Whether the formulas are to run as they stand, and not by `ops/activation_loss.py`.

    A compiler fuses them, and traces no Function that has a jvp. Under `torch.func` a jvp of a jvp through any Function
    is silently wrong (PyTorch's issue 197867). Student and teacher always go the same way, gradient or none: equal
    features must give equal maps to the last bit, since the slope of ‖D‖ does not shrink with D.
    """
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _reduce(features: Tensor, kind: str, p: float, axis: str) -> Tensor:
    """Q before normalisation, in at least float32: (N, H·W) or (N, L); with `axis="channel"` (N, C) or (N, D)."""
    if not _is_traced():
        return activation_loss.reduced(features, kind, p, axis)
    features = wide(features)
    if axis == "channel":
        dim, features = (2, features.flatten(2)) if features.ndim == 4 else (1, features)
    elif features.ndim == 4:
        # In the order of their memory: a compiler makes the gradient so, and would copy it into the features' layout.
        dim, features = (
            (1, features) if features.is_contiguous() else (3, features.permute(0, 2, 3, 1))
        )
    else:
        dim = 2
    q = power(features, p).sum(dim) if kind == "sum" else power(features.abs().max(dim).values, p)
    return q.flatten(1)


def _grid(features: Tensor) -> tuple[int, int]:
    """(H, W), where tokens are a square grid if they can be one, else a single row."""
    if features.ndim == 4:
        return features.shape[2], features.shape[3]
    side = math.isqrt(features.shape[1])
    if side * side == features.shape[1]:
        return side, side
    return 1, features.shape[1]


def as_grid(features: Tensor) -> Tensor:
    return (
        features if features.ndim == 4 else features.transpose(1, 2).unflatten(2, _grid(features))
    )


def common_grid(student: Tensor, teacher: Tensor, name: str) -> tuple[int, int]:
    (hs, ws), (ht, wt) = _grid(student), _grid(teacher)
    for f in (student, teacher):
        if f.ndim == 3 and math.isqrt(f.shape[1]) ** 2 != f.shape[1]:
            raise UserError(
                f"{name}: {f.shape[1]} tokens are no square grid, so they cannot be resized to the other side's "
                f"{(hs, ws) if f is teacher else (ht, wt)}: reshape them to (N, D, H, W) first"
            )
    return min(hs, ht), min(ws, wt)


def _resize_map(q: Tensor, size: tuple[int, int], resize: str) -> Tensor:
    if tuple(q.shape[2:]) == size:
        return q
    if resize == "bilinear":
        return F.interpolate(q, size, mode="bilinear", align_corners=False, antialias=True)
    return F.adaptive_avg_pool2d(q, size)


def _pairs(
    student: Features, teacher: Features, weights: Sequence[float] | Mapping[str, float] | None
) -> list[tuple[str, Tensor, Tensor, float]]:
    """One row a pair: (name, student features, teacher features, weight); never a silent zip."""
    if isinstance(student, Tensor) and isinstance(teacher, Tensor):
        student, teacher = [student], [teacher]
    if isinstance(student, Mapping) and isinstance(teacher, Mapping):
        if student.keys() != teacher.keys():
            raise UserError(
                f"the student's layers are {list(student)}, the teacher's {list(teacher)}: expected the same keys"
            )
        if weights is not None and not isinstance(weights, Mapping):
            raise UserError(
                "weights is a list, but the features are a dict: expected a dict with the same keys"
            )
        if weights is not None and weights.keys() != student.keys():
            raise UserError(
                f"weights has {list(weights)}, the features {list(student)}: expected the same keys"
            )
        return [
            (k, student[k], teacher[k], 1.0 if weights is None else weights[k]) for k in student
        ]
    if isinstance(student, (list, tuple)) and isinstance(teacher, (list, tuple)):
        if len(student) != len(teacher):
            raise UserError(
                f"{len(student)} student features but {len(teacher)} of the teacher's: expected as many"
            )
        if weights is not None and (isinstance(weights, Mapping) or len(weights) != len(student)):
            raise UserError(
                f"weights is {weights!r}: expected a list of {len(student)} numbers, one a pair"
            )
        factors = [1.0] * len(student) if weights is None else list(weights)
        return [
            (f"pair {j}", s, t, w)
            for j, (s, t, w) in enumerate(zip(student, teacher, factors, strict=True))
        ]
    raise UserError(
        f"student features are a {type(student).__name__}, the teacher's a {type(teacher).__name__}: "
        "expected both a tensor, both a list, or both a dict"
    )
