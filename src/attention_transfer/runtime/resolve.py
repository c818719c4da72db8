"""Resolves `auto` in the runtime options. A continued run keeps its earlier values."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from . import cuda_graphs
from .options import RuntimeOptions

# Seconds that compiling adds to a run, and the share of each step that it then saves
# (results/bench.md measured the CPU with 2 cores; the other values are estimates).
COMPILE_SECONDS = {"cpu": 40.0, "cuda": 60.0, "mps": 60.0}
COMPILE_SAVES = {"cpu": 0.10, "cuda": 0.22, "mps": 0.22}
COMPILE_SAVES_AMX = 0.4  # with AMX the convolutions, which compiling does not touch, take less time
# FLOP/s of eager training, by which the length of a run is estimated.
EAGER_FLOPS = {"cpu": 4e11, "cuda": 1e13, "mps": 1e12}


@dataclass(frozen=True)
class RuntimeConfig:
    """The resolved runtime options, stored in environment.json under "auto"."""

    device: str
    precision: str
    compile: bool
    threads: int
    graphs: bool = False  # replay compiled steps as CUDA graphs

    def compile_options(self) -> dict[str, Any]:
        """Arguments for `torch.compile`."""
        if self.graphs:
            return {"dynamic": False, "options": cuda_graphs.OPTIONS}
        return {"dynamic": False}


def resolve_runtime(
    options: RuntimeOptions,
    training_flops: float = 0.0,
    earlier: Mapping[str, Any] | None = None,
    *,
    compilable: bool = True,
    accumulate: int = 1,
) -> RuntimeConfig:
    """Resolves `auto` to the value that the run had `earlier`, else to the best on this machine.

    Args:
        training_flops: FLOPs of the whole run, of student and teacher, forward and backward.
        earlier: the `RuntimeConfig` of the interrupted run that continues, as a dictionary.
        compilable: whether `auto` may compile.
        accumulate: number of micro-batches in a step.

    Raises:
        UserError: if the device is not available, or CUDA graphs are not possible.
    """
    earlier = earlier or {}
    device: str = options.device
    available = _available_devices()
    if device == "auto":
        device = earlier.get("device") or available[0]
    if device not in available:
        names = ", ".join(available)
        raise UserError(f"--device {device}: not available on this machine; available: {names}")
    precision: str = options.precision
    if precision == "auto":
        precision = earlier.get("precision") or ("bf16" if fast_bf16(device) else "fp32")
    refusal = cuda_graphs.refusal(device, accumulate, options.devices * options.nodes)
    if options.compile == "graphs" and refusal:
        raise UserError(f"--compile graphs: {refusal}: choose --compile on")
    compiled, graphs = options.compile != "off", options.compile == "graphs"
    if options.compile == "auto":
        graphs = earlier.get("graphs", False) and refusal is None
        compiled = earlier.get("compile", False)
        if "compile" not in earlier:
            compiled = compilable and _pays_to_compile(device, training_flops)
    # Another number of threads may change the last bits of a continued run.
    threads = earlier.get("threads") or torch.get_num_threads()
    return RuntimeConfig(device, precision, compiled, threads, graphs)


def fast_bf16(device: str) -> bool:
    """Whether the hardware multiplies bfloat16 faster than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # `bool()` is False, the answer if PyTorch lacks this private function.
    has_avx512_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    return device == "cpu" and (_has_amx() or has_avx512_bf16())


def count_flops(module: nn.Module, x: Tensor) -> int:
    """FLOPs of one forward pass on `x`: convolutions and matrix products, 2 for a multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return int(counter.get_total_flops())


def _available_devices() -> list[str]:
    """The devices of this machine, the fastest first."""
    devices = ["cpu"]
    if torch.backends.mps.is_available():
        devices.insert(0, "mps")
    if torch.cuda.is_available():
        devices.insert(0, "cuda")
    return devices


def _has_amx() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def _pays_to_compile(device: str, training_flops: float) -> bool:
    saves = COMPILE_SAVES[device]
    if device == "cpu" and _has_amx():
        saves = COMPILE_SAVES_AMX
    saved_seconds = training_flops / EAGER_FLOPS[device] * saves
    return saved_seconds > COMPILE_SECONDS[device] and can_compile(device)


def can_compile(device: str) -> bool:
    """Whether Inductor works: it needs a C++ compiler for the CPU and Triton for CUDA."""
    if device == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    # On MPS Inductor is a prototype.
    if device != "cpu" or sys.platform == "win32":
        return False
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


def synchronize(device: torch.device) -> None:
    """Waits for the kernels of a GPU, which run asynchronously."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
