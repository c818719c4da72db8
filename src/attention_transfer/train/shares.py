"""Splits a batch over the ranks of a run: each takes every n-th image, all the same number."""

from __future__ import annotations

from ..data.plan import TrainingBatch
from ..errors import UserError


def check_batch_size(batch_size: int, processes: int, accumulate: int) -> None:
    """Raises `UserError` if a process or a micro-batch would get no image."""
    if batch_size < processes:
        raise UserError(f"a batch of {batch_size} images is too small for {processes} processes")
    if batch_size // processes < accumulate:
        raise UserError(
            f"a batch of {batch_size} images cannot be split into {accumulate} micro-batches "
            f"in each of {processes} processes"
        )


def shared_images(batch_size: int, processes: int) -> int:
    """The number of images of a batch that are used: all ranks must have equally many."""
    return batch_size // processes * processes


def describe_left_out(batch_size: int, processes: int) -> str | None:
    """A warning if the processes leave images of each batch out."""
    rest = batch_size - shared_images(batch_size, processes)
    if not rest:
        return None
    return (
        f"{processes} processes share a batch of {batch_size} images evenly, so {rest} of each "
        f"batch are left out: choose a --batch-size that {processes} divides"
    )


def own_share(batch: TrainingBatch, rank: int, processes: int) -> TrainingBatch:
    """The images of one process."""
    share = slice(rank, shared_images(len(batch.labels), processes), processes)
    return TrainingBatch(*(column[share] for column in batch))
