"""Saves the state of a run before it ends with an unreadable image or exhausted memory."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from ..errors import RunError, UserError, is_out_of_memory
from ..runtime.ranks import gather, highest
from .meter import Meter

ADVICE = (
    "use a smaller --batch-size, or split each batch with --accumulate, in another --out; "
    "or free some memory"
)


class Rescue:
    """Saves the state of a run that cannot continue.

    Args:
        module: the networks without a wrapper.
        save: saves the state; all ranks call it together.
    """

    def __init__(self, fabric: Fabric, module: nn.Module, save: Callable[[], None]):
        self.fabric, self.save = fabric, save
        self.before_step = BeforeStep(module, fabric.device)
        self.changes_weights = False  # whether a step is updating the weights

    @contextmanager
    def reading(self, step: int) -> Iterator[None]:
        """For a block that reads images, after `step` steps."""
        error: Exception | None = None
        try:
            yield
        except (UserError, RunError) as raised:
            error = raised
        except Exception as raised:
            if not is_out_of_memory(raised):
                raise
            error = RunError(f"memory is exhausted while images are read: {ADVICE}")
        # All ranks save together; otherwise the others would wait for this rank's gradients.
        if not highest(error is not None):
            return
        errors = [problem for problem in gather(error) if problem is not None]
        kept = ""
        if step:
            self.save()
            kept = "; the state is saved: run the command again to continue"
        self.fabric.barrier()
        raise type(errors[0])(f"{errors[0]}{kept}") from error

    @contextmanager
    def training(self, step: int, meter: Meter) -> Iterator[None]:
        """For the step that follows `step` steps."""
        self.changes_weights = False
        self.before_step.keep(meter)
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            kept = "the last checkpoint is kept"
            # With several ranks the others wait for gradients and cannot save. A partly updated
            # state is not saved.
            can_save = self.fabric.world_size == 1 and not self.changes_weights
            if can_save and self.before_step.restore(error, meter) and step:
                self.save()
                kept = "the state is saved"
            raise RunError(
                f"memory is exhausted in step {step + 1}: {ADVICE}, and run the command again; "
                f"{kept}"
            ) from error


class BeforeStep:
    """A snapshot of the buffers, sums and random state that a step changes before the weights."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.module, self.device = module, device
        self.buffers = list(module.buffers())
        self._kept_buffers = [buffer.clone() for buffer in self.buffers]
        self._meter: tuple[Tensor, int, Tensor] | None = None
        self._rng: list[Tensor] = []

    def keep(self, meter: Meter) -> None:
        """Call this before each step."""
        if self.buffers:
            torch._foreach_copy_(self._kept_buffers, self.buffers)  # few kernel launches
        self._meter = meter.snapshot()
        self._rng = [torch.get_rng_state()]
        if self.device.type == "cuda":
            self._rng.append(torch.cuda.get_rng_state())

    def restore(self, error: BaseException, meter: Meter) -> bool:
        """Undoes the step that raised `error`; False if that is not possible."""
        # Frees the activations that the frames hold, because saving needs some memory.
        traceback.clear_frames(error.__traceback__)
        self.module.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        current = list(self.module.buffers())
        if [id(buffer) for buffer in current] != [id(buffer) for buffer in self.buffers]:
            return False  # a network of the user's that replaces its buffers
        for buffer, kept in zip(self.buffers, self._kept_buffers, strict=True):
            buffer.copy_(kept)
        assert self._meter is not None, "kept before the step"
        meter.load_snapshot(self._meter)
        torch.set_rng_state(self._rng[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self._rng[1])
        return True
