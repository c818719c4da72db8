"""CPU kernels of the activation loss: Σ |A|^p, Y = Q / ‖Q‖₂ and their gradients.

PyTorch's operations write |A|^p to memory (in bfloat16 also a float32 copy of A) and read it back,
and read or write a map several times to normalise it. The kernels read the features once
(results/bench.md has the times).

`kernels.cpp` is compiled on first use, with `CXX` or g++, and kept in attention-transfer/ops of the
cache. Each function returns None if there is no compiler, and for tensors that are not dense
float32 or bfloat16; the caller then uses its formulas.
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

from ..cache import cache_folder

EXPONENTS = (1, 2, 4)
# Elements of features and of maps. Below these sizes the formulas take microseconds.
SMALLEST, SMALLEST_MAPS = 1 << 16, 1 << 11

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp"]
# Without these two, g++ does not vectorise loops with square roots and comparisons.
_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
# By default g++ uses vectors of 256 bits.
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
# Not `-march=native`, because different machines may share the cache.
_CAPABILITY_FLAGS = {"AVX2": ["-mavx2", "-mfma"], "AVX512": [*_AVX512, "-mfma"]}
# Without these declarations ctypes passes integers as 32 bits, which truncates pointers.
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENT_TYPES = {
    "power_sum": [_POINTER] * 2 + [_SIZE] * 3 + [_INT] * 4,
    "power_grad": [_POINTER] * 3 + [_SIZE] * 3 + [_INT] * 4,
    "normalize": [_POINTER] * 3 + [_SIZE] * 2 + [_INT],
    "normalize_backward": [_POINTER] * 5 + [_SIZE] * 2 + [_INT],
}


def power_sum(features: Tensor, p: float, dims: tuple[int, ...]) -> Tensor | None:
    """Σ |A|^p over the dimensions `dims`, kept as 1, in float32."""
    layout = _layout(features, p, dims)
    if layout is None or (library := _library()) is None:
        return None
    shape = list(features.shape)
    for dim in dims:
        shape[dim] = 1
    q = features.new_empty(shape, dtype=torch.float32)
    library.power_sum(features.data_ptr(), q.data_ptr(), *layout)
    return q


def power_grad(features: Tensor, p: float, dims: tuple[int, ...], g: Tensor) -> Tensor | None:
    """g · p·|A|^{p−1}·sign(A), like the features; None also if a graph is needed."""
    # Gradients are enabled in a backward pass that builds a graph; a kernel cannot build one.
    if torch.is_grad_enabled() or not _is_dense_storage(g, torch.float32):
        return None
    layout = _layout(features, p, dims)
    if layout is None or (library := _library()) is None:
        return None
    g, out = g.contiguous(), torch.empty_like(features)
    # The kernel writes in the order of the features' memory.
    if out.stride() != features.stride():
        return None
    library.power_grad(features.data_ptr(), g.data_ptr(), out.data_ptr(), *layout)
    return out


def normalize(q: Tensor) -> tuple[Tensor, Tensor] | None:
    """Y = Q / r (N, M) and r = max(‖Q‖₂, 1e-12) (N, 1) of each row of Q."""
    if not _takes_maps(q) or (library := _library()) is None:
        return None
    y, r = torch.empty_like(q), q.new_empty(len(q), 1)
    library.normalize(q.data_ptr(), y.data_ptr(), r.data_ptr(), *q.shape, torch.get_num_threads())
    return y, r


def normalize_backward(y: Tensor, r: Tensor, g: Tensor, g_r: Tensor) -> Tensor | None:
    """∂L/∂Q from the gradients g and g_r of Y and r; None also if a graph is needed."""
    if torch.is_grad_enabled() or not _takes_maps(y):
        return None
    is_dense = all(_is_dense_storage(t, torch.float32) for t in (r, g, g_r))
    if not is_dense or (library := _library()) is None:
        return None
    out, g, g_r = torch.empty_like(y), g.contiguous(), g_r.contiguous()
    pointers = (t.data_ptr() for t in (y, r, g, g_r, out))
    library.normalize_backward(*pointers, *y.shape, torch.get_num_threads())
    return out


def _layout(features: Tensor, p: float, dims: tuple[int, ...]) -> tuple[int, ...] | None:
    """(n, rows, columns, p, half, inner, threads) for the kernels; None where they do not apply.

    The memory holds (n, rows, columns). `inner`: the sum goes over the columns, else over the rows.
    """
    if p not in EXPONENTS or features.numel() < SMALLEST:
        return None
    if not _is_dense_storage(features, torch.float32, torch.bfloat16) or _is_intercepted():
        return None
    n, second = features.shape[:2]
    rest = features.numel() // (n * second)
    if features.is_contiguous():
        rows, columns, inner = second, rest, 1 not in dims
    elif features.ndim == 4 and features.is_contiguous(memory_format=torch.channels_last):
        rows, columns, inner = rest, second, 1 in dims
    else:
        return None
    half = features.dtype == torch.bfloat16
    return n, rows, columns, int(p), half, inner, torch.get_num_threads()


def _takes_maps(q: Tensor) -> bool:
    if q.ndim != 2 or q.numel() < SMALLEST_MAPS or not q.is_contiguous():
        return False
    return _is_dense_storage(q, torch.float32) and not _is_intercepted()


def _is_intercepted() -> bool:
    """Whether a functorch transform or a dispatch mode intercepts the operations."""
    return torch._C._are_functorch_transforms_active() or is_in_torch_dispatch_mode()


def _is_dense_storage(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether the memory holds the values: no subclass, tangent, lazy negation or lazy zeros."""
    if type(x) not in (Tensor, nn.Parameter) or x.dtype not in dtypes:
        return False
    if x.device.type != "cpu" or x.layout != torch.strided or x.is_neg() or x._is_zerotensor():
        return False
    return forward_ad.unpack_dual(x).tangent is None


@functools.cache
def _library() -> Any:
    """The compiled library, or None if it cannot be compiled or loaded."""
    if sys.platform in ("darwin", "win32") and "CXX" not in os.environ:
        return None  # these have no g++, or one that is a clang without OpenMP
    try:
        capability = torch.backends.cpu.get_cpu_capability()
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        command = [*compiler, *_FLAGS, *_CAPABILITY_FLAGS.get(capability, [])]
        identity = repr((command, platform.platform(), _SOURCE.read_text()))
        key = hashlib.sha256(identity.encode()).hexdigest()[:16]
        file = cache_folder("ops") / f"kernels-{key}.so"
        # The name depends on everything that the code depends on, so an existing file is valid.
        if not file.exists():
            _build(command, file)
        library = ctypes.CDLL(str(file))
        for name, types in _ARGUMENT_TYPES.items():
            getattr(library, name).argtypes = types
    except (OSError, RuntimeError, ValueError, AttributeError, subprocess.SubprocessError):
        return None
    return library


def _build(command: list[str], file: Path) -> None:
    """Compiles to a temporary file and renames it, because several processes may do so at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        output = Path(folder) / file.name
        command = [*command, str(_SOURCE), "-o", str(output)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        os.replace(output, file)
