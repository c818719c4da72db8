"""The losses in float64 NumPy, value and gradient, without autograd.

Y = Q / r with r = max(‖Q‖₂, 1e-12). With g = ∂L/∂Y:
    ∂L/∂Q   = (g − Y·⟨Y, g⟩) / r      (without the projection where ‖Q‖₂ is below the bound)
    ∂L/∂A_c = ∂L/∂Q · p·|A_c|^{p−1}·sign(A_c)      for `sum`; for `max` at the arg-max channel only
A resized map is R_h·Q·R_wᵀ with the matrices of `pooling` or `interpolation`. Its gradient is
R_hᵀ·(∂L/∂Q)·R_w.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def attention(
    a: Array,
    kind: str = "sum",
    p: float = 2.0,
    axis: str = "space",
    rows: Array | None = None,
    columns: Array | None = None,
) -> tuple[Array, Array]:
    """Q and Y, both (N, H·W), or (N, C) with `axis="channel"`, of activations (N, C, H, W)."""
    power = np.abs(a.astype(np.float64)) ** p
    over = (1,) if axis == "space" else (2, 3)
    q = power.sum(over) if kind == "sum" else power.max(over)
    if rows is not None and columns is not None:
        q = rows @ q @ columns.T
    q = q.reshape(len(a), -1)
    return q, q / np.maximum(np.linalg.norm(q, axis=1, keepdims=True), 1e-12)


def attention_gradient(
    a: Array,
    g: Array,
    kind: str = "sum",
    p: float = 2.0,
    axis: str = "space",
    rows: Array | None = None,
    columns: Array | None = None,
) -> Array:
    """∂L/∂A, (N, C, H, W), from g = ∂L/∂Y, (N, M)."""
    a = a.astype(np.float64)
    q, y = attention(a, kind, p, axis, rows, columns)
    length = np.linalg.norm(q, axis=1, keepdims=True)
    projected = g - y * (y * g).sum(1, keepdims=True)
    dq = np.where(length > 1e-12, projected, g) / np.maximum(length, 1e-12)
    n, c, h, w = a.shape
    if rows is not None and columns is not None:
        dq = rows.T @ dq.reshape(n, len(rows), len(columns)) @ columns
    dq = dq.reshape((n, 1, h, w) if axis == "space" else (n, c, 1, 1))
    da = dq * p * np.abs(a) ** (p - 1) * np.sign(a)
    if kind == "sum":
        return da
    if axis == "space":
        return da * (np.arange(c)[None, :, None, None] == np.abs(a).argmax(1)[:, None])
    return da * (np.arange(h * w) == np.abs(a).reshape(n, c, -1).argmax(2)[:, :, None]).reshape(
        a.shape
    )


def distance(d: Array, convention: str = "authors", norm: float = 2.0) -> tuple[float, Array]:
    """The loss of D = Y_student − Y_teacher, (N, M), and ∂L/∂D (under `paper` 0 for a zero row)."""
    if convention == "authors":
        return float((d**2).mean()), 2 * d / d.size
    if convention == "caffe":
        return float((d**2).sum() / (2 * len(d))), d / len(d)
    length = np.linalg.norm(d, ord=norm, axis=1, keepdims=True)
    share = np.divide(np.abs(d), length, out=np.zeros_like(d), where=length > 0)
    slope = (share == 1).astype(np.float64) if np.isinf(norm) else share ** (norm - 1)
    return float(length.mean() / 2), slope * np.sign(d) / (2 * len(d))


def at_loss(
    student: Array,
    teacher: Array,
    kind: str = "sum",
    p: float = 2.0,
    convention: str = "authors",
    norm: float = 2.0,
    axis: str = "space",
    resize: str = "map",
) -> float:
    """The loss of one pair."""
    return _loss(student, teacher, kind, p, convention, norm, axis, resize)[0]


def at_loss_gradient(
    student: Array,
    teacher: Array,
    kind: str = "sum",
    p: float = 2.0,
    convention: str = "authors",
    norm: float = 2.0,
    axis: str = "space",
    resize: str = "map",
) -> Array:
    """∂loss/∂student, (N, C, H, W)."""
    return _loss(student, teacher, kind, p, convention, norm, axis, resize)[1]


def pooling(before: int, after: int) -> Array:
    """Adaptive average pooling, (after, before): cell i averages ⌊i·b/a⌋ to ⌈(i+1)·b/a⌉."""
    matrix = np.zeros((after, before))
    for i in range(after):
        first, last = i * before // after, -(-(i + 1) * before // after)
        matrix[i, first:last] = 1 / (last - first)
    return matrix


def interpolation(before: int, after: int) -> Array:
    """Bilinear reduction, (after, before): a triangle as wide as the ratio, pixel centres at ½."""
    ratio = before / after
    centres, pixels = ratio * (np.arange(after) + 0.5), np.arange(before) + 0.5
    matrix = np.maximum(1 - np.abs(pixels - centres[:, None]) / ratio, 0)
    return matrix / matrix.sum(1, keepdims=True)


def _loss(
    student: Array,
    teacher: Array,
    kind: str,
    p: float,
    convention: str,
    norm: float,
    axis: str,
    resize: str,
) -> tuple[float, Array]:
    sizes = [f.shape[2:] for f in (student, teacher)]
    if axis == "channel" or sizes[0] == sizes[1]:
        return _compare(student, teacher, (kind, p, axis), convention, norm)
    target = tuple(map(min, zip(*sizes, strict=True)))
    matrix = interpolation if resize == "bilinear" else pooling
    (rs, cs), (rt, ct) = (
        [matrix(b, a) for b, a in zip(size, target, strict=True)] for size in sizes
    )
    if resize == "features":
        pooled = rs @ student.astype(np.float64) @ cs.T, rt @ teacher.astype(np.float64) @ ct.T
        value, gradient = _compare(*pooled, (kind, p, axis), convention, norm)
        return value, rs.T @ gradient @ cs
    return _compare(student, teacher, (kind, p, axis), convention, norm, (rs, cs), (rt, ct))


def _compare(
    student: Array,
    teacher: Array,
    mapping: tuple[str, float, str],
    convention: str,
    norm: float,
    of_student: tuple[Array, Array] | tuple[()] = (),
    of_teacher: tuple[Array, Array] | tuple[()] = (),
) -> tuple[float, Array]:
    d = attention(student, *mapping, *of_student)[1] - attention(teacher, *mapping, *of_teacher)[1]
    value, g = distance(d, convention, norm)
    return value, attention_gradient(student, g, *mapping, *of_student)


def linear_gradient_norm(
    w: Array, b: Array, x: Array, labels: Array, target: Array | None = None
) -> tuple[float, Array, Array, Array]:
    """L = ½ · mean_n ‖J_n − target_n‖² of the classifier z = W·x + b, J (N, D), ∂L/∂W and ∂L/∂b.

    With p = softmax(z) and r = p − onehot(y): ∂ℓ/∂z = r, so J = Wᵀr. With v = ∂L/∂J, which is
    (J − target)/N, the loss changes with W by d⟨J, v⟩ = rᵀ·dW·v + (W·v)ᵀ·dr, where dr = S·dz,
    S = diag(p) − p·pᵀ (symmetric) and dz = dW·x + db. So
        ∂L/∂W = Σ_n r·vᵀ + (S·W·v)·xᵀ,   ∂L/∂b = Σ_n S·W·v
    """
    z = x @ w.T + b
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    r = p - np.eye(len(b))[labels]
    j = r @ w
    d = j if target is None else j - target
    v = d / len(x)
    wv = v @ w.T
    s = p * (wv - (p * wv).sum(1, keepdims=True))
    return float((d**2).sum() / (2 * len(x))), j, r.T @ v + s.T @ x, s.sum(0)
