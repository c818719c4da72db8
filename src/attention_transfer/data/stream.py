"""Streams images that do not fit into memory: worker processes decode them ahead of training."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import RunError, first_line, plural
from .decode import (
    UnreadableImageError,
    available_cores,
    decode_into,
    fit_boxes,
    unreadable_message,
)
from .images import ImageSet
from .plan import EpochPlan, EpochPlanner, TrainingBatch
from .reader import Reader
from .transforms import AugmentDraw, CenterCrop, Transform

MAX_WORKERS = 16
PREFETCH = 2  # batches per worker


@dataclass(frozen=True, eq=False)
class StreamSet:
    """Images that stay in their files, with the interface of `ImageSet`.

    `boxes` are in pixels of the original files, and only tell which images have one. `subset`
    returns boxes in pixels of its decoded images.
    """

    reader: Reader
    rows: Tensor  # int64 (N,), the number of each image in `reader`, which is its source
    labels: Tensor
    classes: tuple[str, ...]
    size: int  # height and width in pixels
    short_side: int | None = None  # of the image before the center crop, `size` by default
    on_bad_image: str = "error"
    workers: int = 0
    bad: set[int] = field(default_factory=set)  # indices of images that could not be read

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.size, self.size

    @property
    def source_size(self) -> int:
        """Number of images in the source."""
        return len(self.reader)

    @property
    def boxes(self) -> Tensor | None:
        """int64 (N, 4), 0 0 0 0 if a box is not known."""
        if self.reader.boxes is None:
            return None
        return torch.from_numpy(self.reader.boxes[self.rows.numpy()])

    def subset(self, indices: Tensor) -> ImageSet:
        """The images at `indices` (M,), decoded; unreadable ones are left out or raise."""
        images, sizes = self._decode(indices.cpu())
        good = torch.from_numpy(np.flatnonzero(sizes[:, 0]))
        return images if len(good) == len(images) else images.subset(good)

    def select(self, indices: Tensor) -> StreamSet:
        """The images at `indices` (M,); nothing is decoded."""
        return replace(self, rows=self.rows[indices], labels=self.labels[indices], bad=set())

    def batch(self, indices: Tensor | Sequence[int] | slice) -> Tensor:
        """Images as uint8 (B, 3, H, W), channels_last in memory; an unreadable image is black."""
        if isinstance(indices, slice):
            indices = torch.arange(len(self))[indices]
        images, _ = self._decode(torch.as_tensor(indices, dtype=torch.int64).cpu())
        return images.images.permute(0, 3, 1, 2)

    def _decode(self, indices: Tensor) -> tuple[ImageSet, NDArray[np.int64]]:
        """Images, and widths and heights of the upright images; black and 0 0 if unreadable."""
        reader, rows = self.reader, self.rows[indices].tolist()
        out = np.zeros((len(rows), self.size, self.size, 3), dtype=np.uint8)
        sizes = decode_into(
            out,
            lambda k: reader.encoded(rows[k]),
            lambda k: reader.location(rows[k]),
            self.on_bad_image,
            self.short_side,
        )
        boxes = None
        if reader.boxes is not None:
            upright = reader.boxes[rows].reshape(-1, 4)
            boxes = torch.from_numpy(fit_boxes(upright, sizes, self.size, self.short_side))
        images = ImageSet(
            torch.from_numpy(out),
            self.labels[indices],
            self.classes,
            boxes,
            files=tuple(reader.file(row) for row in rows),
            rows=self.rows[indices],
            source_size=len(reader),
        )
        return images, sizes

    def to(self, device: torch.device | str) -> StreamSet:
        """The same set: its images are moved to a device batch by batch."""
        return self

    def batches(self, batch_size: int, pin: bool = False) -> Iterator[Tensor]:
        """All images in order from the workers, uint8 (B, 3, H, W).

        The first images fill up the last batch, so that all batches have one shape.
        """
        starts = range(0, len(self), batch_size)
        order = (torch.arange(start, start + batch_size) % len(self) for start in starts)
        requests = (BatchRequest(index.numpy(), self.rows[index].numpy()) for index in order)
        for batch in _load(self, CenterCrop(self.short_side), requests, batch_size, pin):
            self.record_bad(batch)
            yield batch.images.permute(0, 3, 1, 2)

    def record_bad(self, batch: Batch) -> None:
        """Adds unreadable images to `bad`.

        Raises:
            UnreadableImageError: if they are an error, or a batch has no readable image.
        """
        if not batch.bad:
            return
        # A substitute has the index of a readable image: if all are bad, none could be read.
        all_bad = all(i in batch.bad for i in batch.index.tolist())
        first = batch.bad[min(batch.bad)]
        if self.on_bad_image != "skip":
            raise UnreadableImageError(first)
        self.bad.update(batch.bad)
        if all_bad:
            raise NoReadableImageError(first)


class NoReadableImageError(UnreadableImageError):
    """Unreadable images are skipped, but a batch has no readable image."""


class Stream(EpochPlanner):
    """Makes the batches of an epoch, as `Augment` does from resident images.

    The plan of an epoch has all random draws, so that any step can be made without earlier ones.
    Each process (`rank` of `world`) decodes only its share of a batch.
    """

    is_sharded = True
    images: StreamSet

    def __init__(
        self,
        images: StreamSet,
        transform: Transform,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
        views: int | None = None,
    ) -> None:
        super().__init__(images, transform.padding, transform.flip, views)
        self.transform = transform
        self.device, self.rank, self.world = torch.device(device), rank, world
        self._batches: Iterator[Batch] | None = None
        self._next: tuple[EpochPlan, int] | None = None

    def batch(self, plan: EpochPlan, step: int) -> TrainingBatch:
        """This process's share of batch `step`; the whole batch if `plan.split` is False.

        Workers prepare the following steps ahead; a step out of order restarts them.
        """
        is_next = self._next is not None and self._next[0] is plan and self._next[1] == step
        if self._batches is None or not is_next:
            self._batches = None  # ends the old workers before new ones start
            requests = (self._request(plan, k) for k in range(step, len(plan)))
            share = plan.batch_size
            if plan.split:
                share = -(-share // self.world)
            pin = self.device.type == "cuda"
            self._batches = _load(self.images, self.transform, requests, share, pin)
        batch = next(self._batches)
        self._next = (plan, step + 1)
        if step + 1 == len(plan):
            # Ends the workers now: validation starts workers of its own.
            self._batches = None
        # After `_next` is set: `teach` catches this error and takes the next step.
        self.images.record_bad(batch)
        index = torch.from_numpy(batch.index)
        labels = self.images.labels[index]
        if self.device.type == "cuda":
            labels = labels.pin_memory()
        x = batch.images.permute(0, 3, 1, 2).to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        return TrainingBatch(x, labels, self.images.rows[index])

    def describe(self, batch_size: int) -> str:
        """A phrase for the log about where the images are decoded."""
        wanted = self.images.workers
        share = -(-batch_size // self.world)
        workers = _limit_workers(wanted, share * self.images.size**2 * 3)
        note = ""
        if workers < wanted:
            note = (
                f" (/dev/shm has no room for the batches of {wanted} workers: "
                "enlarge it, in a container with --shm-size 8g)"
            )
        if not workers:
            return f"images decoded while training, between the steps{note}"
        return f"images decoded while training, by {plural(workers, 'worker')}{note}"

    def _request(self, plan: EpochPlan, step: int) -> BatchRequest:
        end = min((step + 1) * plan.batch_size, len(plan.order))
        positions = torch.arange(step * plan.batch_size, end)
        if self.world > 1 and plan.split:
            # Every process gets the same number of images; the remainder is dropped.
            even = len(positions) // self.world * self.world
            positions = positions[self.rank : even : self.world]
        index = plan.order[positions]
        columns = [plan.dy, plan.dx, plan.flip, plan.noise]
        draws = list(zip(*(column[positions].tolist() for column in columns), strict=True))
        return BatchRequest(index.numpy(), plan.rows[positions].numpy(), draws)


def default_workers(on_cpu: bool, processes: int = 1) -> int:
    """Default number of workers: the cores of this process that training does not use."""
    cores = available_cores() // processes
    # Training on the CPU keeps the cores busy by itself.
    free = cores // 8 if on_cpu else cores - 1
    return max(1, min(MAX_WORKERS, free))


@dataclass(frozen=True)
class BatchRequest:
    """A batch to make: the images' numbers in the set and in the reader, and their draws."""

    index: NDArray[np.int64]
    rows: NDArray[np.int64]
    draws: list[tuple[int, int, bool, int]] | None = None


@dataclass(frozen=True)
class Batch:
    """Images (B, H, W, 3), the number of each in the set, and an error text for each bad number.

    Another image of the batch takes the place of an unreadable one.
    """

    images: Tensor
    index: NDArray[np.int64]
    bad: dict[int, str]

    def pin_memory(self) -> Batch:
        return replace(self, images=self.images.pin_memory())


class BatchDataset(torch.utils.data.Dataset[Any]):
    """Turns a `BatchRequest` into a `Batch`, in a worker."""

    def __init__(self, images: StreamSet, transform: Transform) -> None:
        self.reader, self.size, self.transform = images.reader, images.size, transform

    def __getitem__(self, request: BatchRequest) -> Batch:
        out = np.zeros((len(request.rows), self.size, self.size, 3), dtype=np.uint8)
        index, good, bad = request.index.copy(), [], {}
        for k, row in enumerate(request.rows.tolist()):
            draw = AugmentDraw()
            if request.draws is not None:
                draw = AugmentDraw(*request.draws[k])
            try:
                self.transform(out[k], self.reader.encoded(row), draw)
                good.append(k)
            except MemoryError:
                raise
            except Exception as error:
                # Decoders raise many kinds of exceptions on damaged input.
                bad[k] = unreadable_message(self.reader.location(row), error)
        errors = {int(index[k]): text for k, text in bad.items()}
        if good:
            for k in bad:
                substitute = good[k % len(good)]
                out[k], index[k] = out[substitute], index[substitute]
        return Batch(torch.from_numpy(out), index, errors)


def _load(
    images: StreamSet,
    transform: Transform,
    requests: Iterator[BatchRequest],
    batch_size: int,
    pin: bool,
) -> Iterator[Batch]:
    """The requested batches in order, from workers, or from this process if there are none."""
    workers = _limit_workers(images.workers, batch_size * images.size**2 * 3)
    # The requests take the place of a sampler: the loader sends each to a worker as if it were an
    # index, and returns the batches in their order.
    loader = torch.utils.data.DataLoader(
        BatchDataset(images, transform),
        batch_size=None,
        sampler=requests,  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=pin,
        worker_init_fn=_init_worker if workers else None,
        # By default the loader draws from torch's global generator, which would change training.
        generator=torch.Generator(),
    )
    try:
        yield from loader
    except RuntimeError as error:
        # PyTorch raises a plain RuntimeError for a dead worker: DataLoader worker (pid …) exited …
        if "worker" not in str(error):
            raise
        raise RunError(
            f"a worker that decodes images died ({first_line(error)}): "
            "run the command again with fewer --workers or a smaller --batch-size"
        ) from error


def _limit_workers(workers: int, batch_bytes: int) -> int:
    """As many workers as have room for their batches in /dev/shm, which containers keep small."""
    shared_memory = Path("/dev/shm")
    if not workers or not shared_memory.is_dir():
        return workers
    # Each worker holds its prefetched batches and the current one. A fifth of the shared memory
    # stays free for other uses.
    worker_bytes = (PREFETCH + 1) * max(1, batch_bytes)
    return min(workers, int(0.8 * shutil.disk_usage(shared_memory).free) // worker_bytes)


def _init_worker(number: int) -> None:
    """Ignores Ctrl-C and the first SIGTERM, which are sent to all processes of a group.

    Training needs its workers until it has saved its state.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def ignore_once(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, ignore_once)
