"""What `auto` means on this machine, decided once and kept when a run continues."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Recipe
from ..errors import UserError
from . import cuda_graphs

# Compiling takes so many seconds of a run's start, and makes a step so much cheaper (2 CPU cores: results/bench.md).
COMPILE_SECONDS = {"cpu": 40.0, "cuda": 60.0, "mps": 60.0}
COMPILE_SAVES = {"cpu": 0.10, "cuda": 0.22, "mps": 0.22}  # (the latter two are guesses)
COMPILE_SAVES_AMX = 0.4  # where convolutions take less of a step
# Eager training throughput in FLOP/s, for an estimate of how long a run is.
EAGER_FLOPS = {"cpu": 4e11, "cuda": 1e13, "mps": 1e12}


@dataclass
class RuntimeConfig:
    """The machine's answers to `auto`."""

    device: str
    precision: str
    compile: bool
    threads: int
    graphs: bool = False  # compiled steps are replayed as CUDA graphs

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def compile_options(self) -> dict[str, Any]:
        """What `torch.compile` is to be told."""
        return {"dynamic": False} | ({"options": cuda_graphs.OPTIONS} if self.graphs else {})


def resolve_runtime(
    recipe: Recipe,
    training_flops: float,
    earlier: dict[str, Any] | None = None,
    compilable: bool = True,
) -> RuntimeConfig:
    """Settles device, precision, compilation and threads; `earlier` is what the run that continues had decided.

    Args:
        recipe: its explicit values win over `earlier`, and that over what would be chosen now.
        training_flops: of the whole run, forward and backward, student and teacher.
        compilable: whether `auto` may compile at all.

    Raises:
        UserError: for a device, or CUDA graphs, that were asked for by name and cannot be had.
    """
    earlier = earlier or {}
    device = _settled(recipe.device, earlier.get("device")) or _best_device()
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device):
        raise UserError(
            f"--device {device}: there is none here; available: {', '.join(d for d, here in available.items() if here)}"
        )
    precision = _settled(recipe.precision, earlier.get("precision")) or (
        "bf16" if fast_bf16(device) else "fp32"
    )
    seconds = training_flops / EAGER_FLOPS[device]
    saves = COMPILE_SAVES_AMX if device == "cpu" and _has_amx() else COMPILE_SAVES[device]
    worth = compilable and seconds * saves > COMPILE_SECONDS[device]
    explicit = {"on": True, "off": False, "graphs": True}
    compiled = explicit.get(recipe.compile, earlier.get("compile", worth and _can_compile(device)))
    why = cuda_graphs.refused(recipe, device)
    if recipe.compile == "graphs" and why:
        raise UserError(f"--compile graphs: {why}: choose on")
    replayed = recipe.compile == "graphs" or (
        recipe.compile == "auto" and bool(earlier.get("graphs")) and not why
    )
    threads = int(earlier.get("threads", torch.get_num_threads()))
    return RuntimeConfig(device, precision, bool(compiled), threads, replayed)


def fast_bf16(device: str) -> bool:
    """Whether the hardware multiplies bfloat16 faster than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and (
        _has_amx() or getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    )


def _has_amx() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def keep_malloc_arena() -> None:
    """Tells glibc to keep what it frees for the next step: giving activations back to the system and taking them again
    costs a training step on a CPU much time in page faults. Does nothing elsewhere."""
    import ctypes

    m_trim_threshold, m_mmap_threshold = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    # Older versions refuse more than 32 MiB; without the first, the second would make things worse.
    if mallopt(m_mmap_threshold, 1 << 30) or mallopt(m_mmap_threshold, 1 << 25):
        mallopt(m_trim_threshold, (1 << 31) - 1)


def count_flops(module: nn.Module, x: Tensor) -> int:
    """Floating-point operations of one forward pass on `x` (2 for a multiply-add), convolutions and matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return int(counter.get_total_flops())


def environment(decisions: RuntimeConfig, command: list[str]) -> dict[str, Any]:
    """Versions, hardware, commit, command and decisions of this run."""
    names = ("attention-transfer", "torch", "torchvision", "timm", "lightning", "numpy", "pyarrow")
    return {
        "versions": {"python": platform.python_version()} | {n: _version(n) for n in names},
        "hardware": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": f"{platform.system()} {platform.machine()}",
        },
        "commit": _commit(),
        "command": command,
        "auto": decisions.to_dict(),
    }


def _settled(asked: str, earlier: str | None) -> str | None:
    return asked if asked != "auto" else earlier


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _can_compile(device: str) -> bool:
    """Inductor needs a C++ compiler for the CPU, Triton for CUDA; on MPS it is young."""
    if device == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    if device != "cpu" or sys.platform == "win32":
        return False
    from shutil import which

    return which(os.environ.get("CXX", "g++")) is not None or which("clang++") is not None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of this package's checkout, with a + where files differ from it; None where it is installed."""
    here = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(here)]
        run = subprocess.run(
            [*git, "describe", "--always", "--abbrev=12", "--dirty=+"],
            capture_output=True,
            text=True,
            timeout=10,
        )
        tracked = subprocess.run(
            [*git, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None if tracked.returncode == 0 else None
