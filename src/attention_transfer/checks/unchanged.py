"""Context managers for a trial step, which restore networks and random states afterwards."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ..second_order import BatchStatisticsWarning
from ..transfer import Transfer


@contextmanager
def trial_step(transfer: Transfer, device: torch.device) -> Iterator[None]:
    """Runs the block in eager mode, then restores the networks, `transfer` and random states."""
    with (
        unchanged(transfer),
        random_states_kept(device),
        # Compiling for one batch would take longer than the step.
        torch.compiler.set_stance("force_eager"),
        warnings.catch_warnings(action="ignore", category=BatchStatisticsWarning),
    ):
        yield


@contextmanager
def unchanged(transfer: Transfer) -> Iterator[None]:
    """Restores modes, buffers (such as BN's statistics) and the transfer's own state."""
    modules = list(transfer.modules())
    # The teacher is not among the modules of a Transfer.
    if transfer.teacher is not None:
        modules += transfer.teacher.modules()
    modes = [module.training for module in modules]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modules
        for name, buffer in module.named_buffers(recurse=False)
    ]
    attributes = dict(vars(transfer))
    try:
        yield
    finally:
        vars(transfer).update(attributes)
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for module, name, buffer, value in buffers:
            # A user's network may have replaced the buffer by another tensor.
            module._buffers[name] = buffer
            # Unchanged buffers are not written to: the caller's autograd graph may need them.
            if not torch.equal(buffer, value):
                buffer.detach().copy_(value)


@contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """Restores the random states of Python, NumPy and torch."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # fork_rng does not support MPS, whose get_rng_state takes no device.
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)
