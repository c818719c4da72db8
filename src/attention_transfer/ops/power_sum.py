"""Σ |A|^p and its gradient in one pass over A each, on a CPU, by `power_sum.cpp`; `None` where that does not apply.

PyTorch's operations write |A|^p out, in bfloat16 a float32 copy of A before it, and read that again: 2 to 8 times the
traffic. The source is compiled when first needed, by `CXX` or g++, and kept in attention-transfer/ops of the cache;
without a compiler, and for all but dense float32 and bfloat16 tensors on a CPU, the caller's formulas stand.
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
SMALLEST = 1 << 16  # elements; below, formulas cost microseconds, and a compiler need not be called

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
_OF_CAPABILITY = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
}
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


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


def _call(features: Tensor, p: float, removed: tuple[int, ...]) -> Any:
    """The kernel with all but its pointers, or None."""
    if p not in EXPONENTS or features.numel() < SMALLEST or features.dtype not in (torch.float32, torch.bfloat16):
        return None
    if not _plain(features) or torch._C._are_functorch_transforms_active() or is_in_torch_dispatch_mode():
        return None
    n, second = features.shape[:2]
    if features.is_contiguous():
        rows, columns, inner = second, features.numel() // (n * second), 1 not in removed
    elif features.ndim == 4 and features.is_contiguous(memory_format=torch.channels_last):
        rows, columns, inner = features.numel() // (n * second), second, 1 in removed
    else:
        return None
    kernel = _kernel()
    if kernel is None:
        return None
    half = features.dtype == torch.bfloat16
    threads = torch.get_num_threads()
    return lambda *pointers: kernel(*pointers, n, rows, columns, int(p), half, inner, threads)


def _plain(x: Tensor) -> bool:
    """Whether its memory is its values: no subclass, tangent, lazy sign or other device."""
    usual = type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.layout == torch.strided
    return usual and not x.is_neg() and forward_ad.unpack_dual(x).tangent is None


@functools.cache
def _kernel() -> Any:
    """The function `power_sum` of the compiled source, or None where it cannot be had."""
    try:
        # Not `native`: the cache may be shared by machines of different kinds.
        if sys.platform in ("darwin", "win32") and "CXX" not in os.environ:
            return None  # what is called g++ there knows no OpenMP, or is not there
        flags = [*_FLAGS, *_OF_CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), [])]
        command = [*shlex.split(os.environ.get("CXX", "g++")), *flags]
        key = hashlib.sha256(repr((command, platform.platform(), _SOURCE.read_text())).encode()).hexdigest()[:16]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attention-transfer" / "ops"
        file = cache / f"power_sum-{key}.so"
        if not file.exists():
            _build(command, file)
        kernel = ctypes.CDLL(str(file)).power_sum
    except (OSError, RuntimeError, ValueError, AttributeError, subprocess.SubprocessError):
        return None
    kernel.argtypes = [_POINTER] * 4 + [_SIZE] * 3 + [_INT] * 4
    return kernel


def _build(command: list[str], file: Path) -> None:
    """Into its place in one go: several processes may be at it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        subprocess.run([*command, str(_SOURCE), "-o", str(made)], check=True, capture_output=True, timeout=120)
        os.replace(made, file)
