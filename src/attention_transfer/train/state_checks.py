"""Checks the state in a checkpoint, and loads that of the optimizer and the scheduler.

torch itself loads any values, and an impossible one would end a later step with torch's own error.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..run_schema import CheckpointNumbers, validated

NUMBERS = (int, float)
LARGEST = sys.float_info.max
# The entries of a scheduler's state that change while training.
POSITION = ("last_epoch", "_step_count", "_last_lr")


def load_optimization(optimizer: Optimizer, scheduler: LRScheduler, state: dict[str, Any]) -> None:
    """Loads the state of the optimizer and the scheduler from a checkpoint.

    Also checks the entries of the checkpoint that hold no tensors.

    Raises:
        ValueError: for an impossible value, naming it.
    """
    numbers = {key: state[key] for key in CheckpointNumbers.model_fields}
    validated(numbers, CheckpointNumbers, "it")
    _load_optimizer(optimizer, state["optimizer"])
    _load_scheduler(scheduler, state["scheduler"], state["step"])


def check_same_kind(value: Any, like: Any, name: str) -> None:
    """Checks that `value`, read from a file, has the types and lengths of `like`.

    Numbers must be finite. Keys that only one of two mappings has are ignored: they differ between
    versions of torch.

    Raises:
        ValueError: naming the entry.
    """
    if isinstance(like, Mapping):
        fits = isinstance(value, Mapping)
        entries = [(key, like[key]) for key in like if fits and key in value]
    elif isinstance(like, (list, tuple)):
        fits = isinstance(value, (list, tuple)) and len(value) == len(like)
        entries = list(enumerate(like))
    elif isinstance(like, NUMBERS) and not isinstance(like, bool):
        is_number = isinstance(value, NUMBERS) and not isinstance(value, bool)
        fits, entries = is_number and -LARGEST <= value <= LARGEST, []
    else:
        # Options such as `fused` are None until torch sets them.
        fits, entries = isinstance(value, bool if like is None else type(like)) or value is like, []
    if not fits:
        raise ValueError(f"{name} is {str(value)[:40]!r}")
    for key, entry in entries:
        check_same_kind(value[key], entry, f"{name}.{key}")


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    before = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for number, (group, options) in enumerate(zip(optimizer.param_groups, before, strict=True)):
        options.pop("params")
        check_same_kind(group, options, f"its parameter group {number}")
        missing = options.keys() - group.keys()  # torch has added the options of newer versions
        if missing:
            raise ValueError(f"its parameter group {number} lacks {min(missing)}")
    entries = set()
    for parameter, values in optimizer.state.items():
        entries.add(frozenset(values))
        for key, value in values.items():
            if not _fits(value, parameter):
                raise ValueError(f"the {key} of a parameter does not fit it")
    if len(entries) > 1:
        raise ValueError("parameters lack entries of the optimizer's state")


def _load_scheduler(scheduler: LRScheduler, state: dict[str, Any], step: int) -> None:
    # Only its position: the other entries of its state follow from the recipe.
    position = {key: state[key] for key in POSITION}
    check_same_kind(position, scheduler.state_dict(), "its scheduler")
    # The scheduler does not follow the last step of a run.
    if position["last_epoch"] not in (step, step - 1):
        raise ValueError(f"its scheduler is at step {position['last_epoch']}")
    scheduler.load_state_dict(position)


def _fits(value: Any, parameter: Tensor) -> bool:
    """Whether `value` may be the state of a parameter: a step, or a tensor of its shape."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.is_floating_point()
        and not value.is_meta
        and value.shape in ((), parameter.shape)
    )
