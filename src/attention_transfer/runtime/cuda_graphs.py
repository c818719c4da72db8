"""The steps of a run as CUDA graphs: who may have them, what the compiler is told, whether they came about."""

from __future__ import annotations

import torch

from ..config import Recipe
from ..errors import UserError

# In one piece: what is partitioned may lose parts of its graphs without their being counted.
OPTIONS = {"triton.cudagraphs": True, "graph_partition": False}


def refused(recipe: Recipe, device: str) -> str | None:
    """Why the steps of this run cannot be CUDA graphs."""
    if device != "cuda":
        return f"CUDA graphs need a GPU, and the device is {device}"
    if recipe.accumulate > 1:
        return "gradients that are replayed do not add up (--accumulate)"
    if recipe.devices * recipe.nodes > 1:
        return "processes that share gradients do not replay their steps"
    return None


class CudaGraphs:
    """Around the steps of one training."""

    def __init__(self) -> None:
        self._before = _left_out()
        self._checked = False

    def begin(self) -> None:
        """Before each forward pass: what the last step gave is over."""
        torch.compiler.cudagraph_mark_step_begin()

    def check(self) -> None:
        """After a step; looks once, at the first.

        Raises:
            UserError: where the compiler made some of the step without.
        """
        if not self._checked and (left := _left_out() - self._before):
            raise UserError(
                f"--compile graphs: {left} compiled parts of a step cannot be CUDA graphs (TORCH_LOGS=cudagraphs says "
                "why): choose on"
            )
        self._checked = True


def _left_out() -> int:
    """Compiled parts that were to be CUDA graphs and are not, in this process."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["cudagraph_skips"]
