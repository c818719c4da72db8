"""Shared by the checks: a finding, and the networks' last inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from ..transfer import Transfer

STAGES_HINT = "see `attention-transfer stages STUDENT TEACHER`"


@dataclass(frozen=True)
class Finding:
    """One finding of preflight.

    error: the run would be worthless; warning: it probably would be; note: for information only.
    """

    level: Literal["note", "warning", "error"]
    text: str


@dataclass
class NetworkIO:
    """Each network's last input, after its own preprocessing, and its last output."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def classes(self) -> dict[str, int]:
        """K of the logits (N, K) of each network that returned logits."""
        return {side: y.shape[1] for side, y in self.outputs.items() if y.ndim == 2}


def networks(transfer: Transfer) -> list[tuple[str, nn.Module]]:
    """("student", network), and ("teacher", network) if there is one."""
    sides: list[tuple[str, nn.Module]] = [("student", transfer.student)]
    if transfer.teacher is not None:
        sides.append(("teacher", transfer.teacher))
    return sides


@contextmanager
def watch_networks(transfer: Transfer) -> Iterator[NetworkIO]:
    """Records the networks' inputs and outputs during the block."""
    io = NetworkIO()

    def record(side: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor):
            io.inputs[side] = args[0].detach()
        if isinstance(output, Tensor):
            io.outputs[side] = output.detach()

    handles = [net.register_forward_hook(partial(record, side)) for side, net in networks(transfer)]
    try:
        yield io
    finally:
        for handle in handles:
            handle.remove()
