"""Kernels of the activation loss: Σ |A|^p and its gradient, on a CPU also Y = Q / ‖Q‖₂ and its; `None` where they do
not apply.

PyTorch's operations write |A|^p out, in bfloat16 a float32 copy of A before it, and read that again: 2 to 8 times the
traffic. Of a map, small as it is, they make some ten passes. For a CPU `kernels.cpp` is compiled when first needed, by
`CXX` or g++, and kept in attention-transfer/ops of the cache; for a GPU Triton compiles `triton_kernels.py`. Without a
compiler, and for all but dense tensors of usual dtypes, the caller's formulas stand.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

EXPONENTS = (1, 2, 4)
# Elements of features and of maps; below, formulas cost microseconds, and a compiler need not be called.
SMALLEST, SMALLEST_MAPS = 1 << 16, 1 << 11

_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
]
_OF_CAPABILITY = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mfma",
        "-mprefer-vector-width=512",
    ],
}
_TRIED: dict[
    torch.device, Any
] = {}  # Triton's kernels, or None, by the GPU that they were tried on
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS = {
    "power_sum": [_POINTER] * 2 + [_SIZE] * 3 + [_INT] * 4,
    "power_grad": [_POINTER] * 3 + [_SIZE] * 3 + [_INT] * 4,
    "normalize": [_POINTER] * 3 + [_SIZE] * 2 + [_INT],
    "normalize_backward": [_POINTER] * 5 + [_SIZE] * 2 + [_INT],
}


class Rows(NamedTuple):
    """Features as (n, rows, columns), contiguous; `inner`: summed over the columns, else over the rows."""

    n: int
    rows: int
    columns: int
    inner: bool


def power_sum(features: Tensor, p: float, removed: tuple[int, ...]) -> Tensor | None:
    """Σ |A|^p over the dimensions `removed`, kept as 1, in float32."""
    rows, kernels = _found(features, p, removed)
    if rows is None:
        return None
    shape = [1 if d in removed else size for d, size in enumerate(features.shape)]
    q = features.new_empty(shape, dtype=torch.float32)
    if features.is_cuda:
        kernels.power_sum(features, q, kernels.Layout.of(*rows), int(p))
    else:
        kernels.power_sum(features.data_ptr(), q.data_ptr(), *_numbers(features, p, rows))
    return q


def power_grad(features: Tensor, p: float, removed: tuple[int, ...], g: Tensor) -> Tensor | None:
    """g · p·|A|^{p−1}·sign(A), like the features; None also where it is to be differentiated itself."""
    if torch.is_grad_enabled() or not _plain(g) or g.dtype != torch.float32:
        return None
    rows, kernels = _found(features, p, removed)
    if rows is None:
        return None
    g, slope = g.contiguous(), torch.empty_like(features)
    if slope.stride() != features.stride():
        return None
    if features.is_cuda:
        kernels.power_grad(features, g, slope, kernels.Layout.of(*rows), int(p))
    else:
        kernels.power_grad(
            features.data_ptr(), g.data_ptr(), slope.data_ptr(), *_numbers(features, p, rows)
        )
    return slope


def normalize(q: Tensor) -> tuple[Tensor, Tensor] | None:
    """Y = Q / r (N, M) and r = max(‖Q‖₂, 1e-12) (N, 1) of each row of Q."""
    if not _maps(q) or (library := _library()) is None:
        return None
    y, r = torch.empty_like(q), q.new_empty(len(q), 1)
    library.normalize(q.data_ptr(), y.data_ptr(), r.data_ptr(), *q.shape, torch.get_num_threads())
    return y, r


def normalize_backward(y: Tensor, r: Tensor, g: Tensor, g_r: Tensor) -> Tensor | None:
    """∂L/∂Q of the gradients g and g_r of Y and r; None also where it is to be differentiated itself."""
    if torch.is_grad_enabled() or not _maps(y) or not all(map(_plain, (r, g, g_r))):
        return None
    if g.dtype != torch.float32 or (library := _library()) is None:
        return None
    out, g, g_r = torch.empty_like(y), g.contiguous(), g_r.contiguous()
    pointers = (t.data_ptr() for t in (y, r, g, g_r, out))
    library.normalize_backward(*pointers, *y.shape, torch.get_num_threads())
    return out


def _maps(q: Tensor) -> bool:
    large = q.ndim == 2 and q.numel() >= SMALLEST_MAPS and q.device.type == "cpu"
    return (
        large
        and q.dtype == torch.float32
        and q.is_contiguous()
        and _plain(q)
        and not _intercepted()
    )


def _intercepted() -> bool:
    """Whether a transform or a mode stands between these tensors and their memory."""
    return torch._C._are_functorch_transforms_active() or is_in_torch_dispatch_mode()


def as_rows(features: Tensor, removed: tuple[int, ...]) -> Rows | None:
    """How features that are summed over the dimensions `removed` lie in memory; None where they have gaps."""
    n, second = features.shape[:2]
    if features.is_contiguous():
        return Rows(n, second, features.numel() // (n * second), 1 not in removed)
    if features.ndim == 4 and features.is_contiguous(memory_format=torch.channels_last):
        return Rows(n, features.numel() // (n * second), second, 1 in removed)
    return None


def _found(features: Tensor, p: float, removed: tuple[int, ...]) -> tuple[Rows | None, Any]:
    """The rows of these features and the kernels for them, or (None, None)."""
    if (
        p not in EXPONENTS
        or features.numel() < SMALLEST
        or features.dtype not in _DTYPES.get(features.device.type, ())
    ):
        return None, None
    if not _plain(features) or _intercepted() or (rows := as_rows(features, removed)) is None:
        return None, None
    kernels = _triton(features.device) if features.is_cuda else _library()
    return (None, None) if kernels is None else (rows, kernels)


def _numbers(features: Tensor, p: float, rows: Rows) -> tuple[int, ...]:
    half = features.dtype == torch.bfloat16
    return rows.n, rows.rows, rows.columns, int(p), half, rows.inner, torch.get_num_threads()


def _plain(x: Tensor) -> bool:
    """Whether its memory is its values: no subclass, tangent, lazy sign or lazy zeros."""
    usual = (
        type(x) in (Tensor, nn.Parameter) and x.device.type in _DTYPES and x.layout == torch.strided
    )
    return (
        usual
        and not x.is_neg()
        and not x._is_zerotensor()
        and forward_ad.unpack_dual(x).tangent is None
    )


def _triton(device: torch.device) -> Any:
    """The module of the kernels, if they work on this GPU."""
    if device not in _TRIED:
        if torch.cuda.is_current_stream_capturing():
            return None  # a trial would end up in somebody's CUDA graph
        try:
            from . import triton_kernels as kernels

            _TRIED[device] = (
                kernels if all(_works(kernels, device, inner) for inner in (False, True)) else None
            )
        except Exception:  # whatever a compiler and a driver may come up with
            _TRIED[device] = None
    return _TRIED[device]


def _works(kernels: Any, device: torch.device, inner: bool) -> bool:
    """Whether both kernels give what is right for a few numbers."""
    a = torch.arange(-4.0, 4.0, device=device, dtype=torch.bfloat16).view(2, 2, 2)
    g = torch.ones(2, 2, device=device)
    q, slope = torch.empty_like(g), torch.empty_like(a)
    layout = kernels.Layout.of(2, 2, 2, inner)
    kernels.power_sum(a, q, layout, 2)
    kernels.power_grad(a, g, slope, layout, 2)
    return torch.equal(q, a.float().square().sum(2 if inner else 1)) and torch.equal(slope, 2 * a)


@functools.cache
def _library() -> Any:
    """The compiled source, or None where it cannot be had."""
    try:
        # Not `native`: the cache may be shared by machines of different kinds.
        if sys.platform in ("darwin", "win32") and "CXX" not in os.environ:
            return None  # what is called g++ there knows no OpenMP, or is not there
        flags = [*_FLAGS, *_OF_CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), [])]
        command = [*shlex.split(os.environ.get("CXX", "g++")), *flags]
        key = hashlib.sha256(
            repr((command, platform.platform(), _SOURCE.read_text())).encode()
        ).hexdigest()[:16]
        cache = (
            Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            / "attention-transfer"
            / "ops"
        )
        file = cache / f"kernels-{key}.so"
        if not file.exists():
            _build(command, file)
        library = ctypes.CDLL(str(file))
        for name, arguments in _ARGUMENTS.items():
            getattr(library, name).argtypes = arguments
    except (OSError, RuntimeError, ValueError, AttributeError, subprocess.SubprocessError):
        return None
    return library


def _build(command: list[str], file: Path) -> None:
    """Into its place in one go: several processes may be at it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        subprocess.run(
            [*command, str(_SOURCE), "-o", str(made)], check=True, capture_output=True, timeout=120
        )
        os.replace(made, file)
