"""Times a step in a separate process with PyTorch's default allocator and threads."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from ..errors import RunError
from ..runtime.resolve import synchronize
from .measure import Measure
from .options import BenchOptions

Batches = Iterator[tuple[Tensor, Tensor]]


@contextmanager
def in_subprocess(
    make: Callable[[], Any],
    options: BenchOptions,
    device: torch.device | str,
    loader: Callable[[], Batches] | None = None,
    size: int = 32,
) -> Iterator[Measure]:
    """Measures `options.steps` steps of `options.batch_size` images.

    `make` returns the step: a callable of images (N, 3, H, W) and labels (N,), with `to(device)`.
    `loader` returns endless batches, and the time includes loading; without a loader, the step gets
    one random batch of height and width `size`.

    Raises:
        RunError: if the process dies.
    """
    # The device of Fabric has an index, which the subprocess does not need.
    device_type = torch.device(device).type
    if loader is None:
        loader = partial(random_batches, options.batch_size, size, device_type)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _start, (make, loader, device_type)) as pool:

        def measure() -> float:
            try:
                seconds = pool.submit(_run, options.steps).result()
            except BrokenProcessPool:
                raise RunError("a subprocess of the bench died; its own message is above") from None
            return options.steps * options.batch_size / seconds

        yield measure


def random_batches(batch_size: int, size: int, device: str) -> Batches:
    torch.manual_seed(1)
    x = torch.randn(batch_size, 3, size, size, device=device)
    return repeat((x, torch.randint(10, (batch_size,), device=device)))


# The state of the subprocess between two measurements.
_step: Callable[[Tensor, Tensor], object]
_batches: Batches
_device: torch.device


def _start(make: Callable[[], Any], loader: Callable[[], Batches], device: str) -> None:
    global _step, _batches, _device
    torch.backends.cudnn.benchmark = True  # as in the authors' script
    _step, _batches, _device = make().to(device), loader(), torch.device(device)


def _run(steps: int) -> float:
    """Seconds of this many steps."""
    start = time.perf_counter()
    for _ in range(steps):
        x, y = next(_batches)
        _step(x.to(_device), y.to(_device))
    synchronize(_device)
    return time.perf_counter() - start
