"""The activation loss on a CPU by `kernels.cpp`: Σ |A|^p and Y = Q / ‖Q‖₂, and their gradients; `None` where that does
not apply.

PyTorch's operations write |A|^p out, in bfloat16 a float32 copy of A before it, and read that again: 2 to 8 times the
traffic. Of a map, small as it is, they make some ten passes. The source is compiled when first needed, by `CXX` or g++,
and kept in attention-transfer/ops of the cache; without a compiler, and for all but dense float32 and bfloat16 tensors
on a CPU, the caller's formulas stand.
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
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

EXPONENTS = (1, 2, 4)
# Elements of features and of maps; below, formulas cost microseconds, and a compiler need not be called.
SMALLEST, SMALLEST_MAPS = 1 << 16, 1 << 11

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
_OF_CAPABILITY = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
}
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS = {
    "power_sum": [_POINTER] * 4 + [_SIZE] * 3 + [_INT] * 4,
    "normalize": [_POINTER] * 3 + [_SIZE] * 2 + [_INT],
    "normalize_slope": [_POINTER] * 5 + [_SIZE] * 2 + [_INT],
}


def power_sum(features: Tensor, p: float, removed: tuple[int, ...]) -> Tensor | None:
    """Σ |A|^p over the dimensions `removed`, kept as 1, in float32."""
    call = _call(features, p, removed)
    if call is None:
        return None
    shape = [1 if d in removed else size for d, size in enumerate(features.shape)]
    q = features.new_empty(shape, dtype=torch.float32)
    call(features.data_ptr(), q.data_ptr(), None, None)
    return q


def power_slope(features: Tensor, p: float, removed: tuple[int, ...], g: Tensor) -> Tensor | None:
    """g · p·|A|^{p−1}·sign(A), like the features; None also where it is to be differentiated itself."""
    if torch.is_grad_enabled() or not _plain(g) or g.dtype != torch.float32:
        return None
    call = _call(features, p, removed)
    if call is None:
        return None
    g, slope = g.contiguous(), torch.empty_like(features)
    if slope.stride() != features.stride():
        return None
    call(features.data_ptr(), None, g.data_ptr(), slope.data_ptr())
    return slope


def normalize(q: Tensor) -> tuple[Tensor, Tensor] | None:
    """Y = Q / r (N, M) and r = max(‖Q‖₂, 1e-12) (N, 1) of each row of Q."""
    if not _maps(q) or (library := _library()) is None:
        return None
    y, r = torch.empty_like(q), q.new_empty(len(q), 1)
    library.normalize(q.data_ptr(), y.data_ptr(), r.data_ptr(), *q.shape, torch.get_num_threads())
    return y, r


def normalize_slope(y: Tensor, r: Tensor, g: Tensor, g_r: Tensor) -> Tensor | None:
    """∂L/∂Q of the gradients g and g_r of Y and r; None also where it is to be differentiated itself."""
    g, g_r = g.contiguous(), g_r.contiguous()
    if torch.is_grad_enabled() or not all(map(_maps, (y, g))) or not all(map(_plain, (r, g_r))):
        return None
    if (library := _library()) is None:
        return None
    out = torch.empty_like(y)
    pointers = (t.data_ptr() for t in (y, r, g, g_r, out))
    library.normalize_slope(*pointers, *y.shape, torch.get_num_threads())
    return out


def _maps(q: Tensor) -> bool:
    large = q.ndim == 2 and q.numel() >= SMALLEST_MAPS
    return large and q.dtype == torch.float32 and q.is_contiguous() and _plain(q) and not _intercepted()


def _intercepted() -> bool:
    """Whether a transform or a mode stands between these tensors and their memory."""
    return torch._C._are_functorch_transforms_active() or is_in_torch_dispatch_mode()


def _call(features: Tensor, p: float, removed: tuple[int, ...]) -> Any:
    """The kernel with all but its pointers, or None."""
    if p not in EXPONENTS or features.numel() < SMALLEST or features.dtype not in (torch.float32, torch.bfloat16):
        return None
    if not _plain(features) or _intercepted():
        return None
    n, second = features.shape[:2]
    if features.is_contiguous():
        rows, columns, inner = second, features.numel() // (n * second), 1 not in removed
    elif features.ndim == 4 and features.is_contiguous(memory_format=torch.channels_last):
        rows, columns, inner = features.numel() // (n * second), second, 1 in removed
    else:
        return None
    if (library := _library()) is None:
        return None
    half = features.dtype == torch.bfloat16
    threads = torch.get_num_threads()
    return lambda *pointers: library.power_sum(*pointers, n, rows, columns, int(p), half, inner, threads)


def _plain(x: Tensor) -> bool:
    """Whether its memory is its values: no subclass, tangent, lazy sign or other device."""
    usual = type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.layout == torch.strided
    return usual and not x.is_neg() and forward_ad.unpack_dual(x).tangent is None


@functools.cache
def _library() -> Any:
    """The compiled source, or None where it cannot be had."""
    try:
        # Not `native`: the cache may be shared by machines of different kinds.
        if sys.platform in ("darwin", "win32") and "CXX" not in os.environ:
            return None  # what is called g++ there knows no OpenMP, or is not there
        flags = [*_FLAGS, *_OF_CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), [])]
        command = [*shlex.split(os.environ.get("CXX", "g++")), *flags]
        key = hashlib.sha256(repr((command, platform.platform(), _SOURCE.read_text())).encode()).hexdigest()[:16]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attention-transfer" / "ops"
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
        subprocess.run([*command, str(_SOURCE), "-o", str(made)], check=True, capture_output=True, timeout=120)
        os.replace(made, file)
