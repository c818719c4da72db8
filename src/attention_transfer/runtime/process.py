"""Sets up a training process: Fabric, threads, allocator, determinism and compilation."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision

from ..errors import UserError
from ..ops import batch_norm
from ..transfer import Transfer
from .options import RuntimeOptions
from .resolve import RuntimeConfig

POLL_SECONDS = 0.5  # time between checks for the parent process
SAVING_SECONDS = 60.0  # time to save the state when the parent has ended
# Constants of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


class AutocastOnly(MixedPrecision):
    """bfloat16 by autocast alone.

    Lightning's class would also cast the inputs: images, mixed labels, the progress of schedules.
    """

    def convert_input(self, data: Any) -> Any:
        return data


def make_fabric(options: RuntimeOptions, runtime: RuntimeConfig) -> Fabric:
    """The launched Fabric of a run, with its device, processes and autocast."""
    for name in ("lightning.fabric", "lightning.pytorch"):  # Fabric logs to either
        logging.getLogger(name).setLevel(logging.WARNING)
    # Inductor looks for CUDA's compiler and warns if it is missing, even without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    precision: dict[str, Any] = {"precision": "32-true"}
    if runtime.precision == "bf16":
        precision = {"plugins": [AutocastOnly("bf16-mixed", runtime.device)]}
    fabric = Fabric(
        accelerator=runtime.device,
        devices=options.devices,
        num_nodes=options.nodes,
        strategy="ddp" if options.devices * options.nodes > 1 else "auto",
        **precision,
    )
    fabric.launch()
    return fabric


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Uses deterministic algorithms inside the block, as PyTorch's notes on reproducibility advise.

    Raises:
        UserError: for an operation that has no deterministic form.
    """
    if not enabled:
        yield
        return
    # cuBLAS reads this variable when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    mode, benchmark = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise UserError(
            f"--deterministic: {operation} has no deterministic form on this device: "
            "leave the flag out, or choose other --pairs, --resize or --model"
        ) from error
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def use_threads(threads: int | None = None) -> Iterator[None]:
    """Uses this number of threads inside the block; afterwards the number is as it was before."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def set_up_process(runtime: RuntimeConfig) -> RuntimeConfig:
    """Sets threads and allocator of this process; returns `runtime`."""
    torch.set_num_threads(runtime.threads)
    keep_malloc_arena()
    return runtime


def compile_transfer(transfer: Transfer, runtime: RuntimeConfig) -> None:
    """Compiles a transfer in place, by the fastest method that the device supports."""
    if runtime.device == "cpu" and not any(m.needs_gradient for m in transfer.methods):
        batch_norm.use_in(transfer.student)  # it has no second derivative
    transfer.compile(**runtime.compile_options())


def local_rank() -> int:
    """The rank of this process on its node; 0 until the processes have been started."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def end_with_parent(parent: int) -> None:
    """Ends this process when its parent, process number `parent`, has ended.

    The process gets SIGTERM, so that a run saves its state. (Windows keeps the number of a dead
    parent, so the process does not end there.)
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SAVING_SECONDS)
        os._exit(1)  # the main thread hangs, for example in a collective operation

    if sys.platform != "win32":
        threading.Thread(target=watch, daemon=True).start()


def keep_malloc_arena() -> None:
    """Tells glibc to keep freed memory for the next step; does nothing with other C libraries.

    If activations are returned to the system and allocated again, a training step on a CPU loses
    much time to page faults.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    # Older versions refuse more than 32 MiB. If both values are refused, a higher trim threshold
    # alone would be slower than the default.
    if mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, 1 << 25):
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
