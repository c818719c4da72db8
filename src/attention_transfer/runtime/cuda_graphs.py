"""Training steps as CUDA graphs, by torch.compile (`--compile graphs`)."""

from __future__ import annotations

import torch

from ..errors import UserError

# Inductor does not count the graphs that it drops from a partitioned graph.
OPTIONS = {"triton.cudagraphs": True, "graph_partition": False}


def refusal(device: str, accumulate: int, processes: int) -> str | None:
    """Why the steps of a run cannot be CUDA graphs; None if they can."""
    if device != "cuda":
        return f"CUDA graphs need a GPU, and the device is {device}"
    if accumulate > 1:
        return "replayed gradients do not add up (--accumulate)"
    if processes > 1:
        return "processes that share gradients cannot replay their steps"
    return None


class CudaGraphs:
    """The trainer calls `begin` before, and `check` after, each step of one training run."""

    def __init__(self) -> None:
        self._skips_before = _cudagraph_skips()
        self._checked = False

    def begin(self) -> None:
        """Call before each forward pass: the outputs of the last step may be overwritten."""
        torch.compiler.cudagraph_mark_step_begin()

    def check(self) -> None:
        """Call after each step; checks the first one only.

        Raises:
            UserError: if the compiler left parts of the step without a CUDA graph.
        """
        if self._checked:
            return
        self._checked = True
        skips = _cudagraph_skips() - self._skips_before
        if skips:
            raise UserError(
                f"--compile graphs: {skips} compiled parts of a step cannot be CUDA graphs "
                "(TORCH_LOGS=cudagraphs shows why): choose --compile on"
            )


def _cudagraph_skips() -> int:
    """Number of compiled parts in this process that should be CUDA graphs but are not."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["cudagraph_skips"]
