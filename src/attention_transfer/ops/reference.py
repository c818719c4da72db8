"""The activation loss written out in float64, value and gradient, with no autograd: the oracle of the tests.

Y = Q / r with r = max(‖Q‖₂, 1e-12). With g = ∂L/∂Y:
    ∂L/∂Q   = (g − Y·⟨Y, g⟩) / r      (without the projection where ‖Q‖₂ is below the bound)
    ∂L/∂A_c = ∂L/∂Q · p·|A_c|^{p−1}·sign(A_c)      for `sum`; for `max` at the arg-max channel only
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def attention(a: Array, kind: str = "sum", p: float = 2.0) -> tuple[Array, Array]:
    """Q and Y, both (N, H·W), of activations (N, C, H, W) in float64."""
    power = np.abs(a.astype(np.float64)) ** p
    q = power.sum(1) if kind == "sum" else power.max(1)
    q = q.reshape(len(a), -1)
    return q, q / np.maximum(np.linalg.norm(q, axis=1, keepdims=True), 1e-12)


def at_loss(student: Array, teacher: Array, kind: str = "sum", p: float = 2.0, convention: str = "authors") -> float:
    """The loss of one pair of equal spatial size."""
    d = attention(student, kind, p)[1] - attention(teacher, kind, p)[1]
    if convention == "authors":
        return float((d**2).mean())
    if convention == "caffe":
        return float((d**2).sum() / (2 * len(d)))
    return float(np.linalg.norm(d, axis=1).mean() / 2)


def at_loss_gradient(
    student: Array, teacher: Array, kind: str = "sum", p: float = 2.0, convention: str = "authors"
) -> Array:
    """∂loss/∂student, (N, C, H, W)."""
    a = student.astype(np.float64)
    q, y = attention(a, kind, p)
    d = y - attention(teacher, kind, p)[1]
    if convention == "authors":
        g = 2 * d / d.size
    elif convention == "caffe":
        g = d / len(d)
    else:
        length = np.linalg.norm(d, axis=1, keepdims=True)
        g = np.divide(d, length, out=np.zeros_like(d), where=length > 0) / (2 * len(d))
    length = np.linalg.norm(q, axis=1, keepdims=True)
    projected = g - y * (y * g).sum(1, keepdims=True)
    dq = np.where(length > 1e-12, projected, g) / np.maximum(length, 1e-12)
    dq = dq.reshape(len(a), 1, *a.shape[2:])
    da = dq * p * np.abs(a) ** (p - 1) * np.sign(a)
    if kind == "max":
        da *= np.arange(a.shape[1])[None, :, None, None] == np.abs(a).argmax(1)[:, None]
    return da
