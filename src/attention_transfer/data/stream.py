"""Images that do not fit in memory: decoded anew each time by worker processes, ahead of the training."""

from __future__ import annotations

import os
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

from ..errors import RunError, UserError
from .augment import EpochPlan, draw_epoch
from .decode import unreadable
from .images import ImageSet, seeded
from .reader import Reader, decode_rows, without_bad
from .transforms import Centre, Draw, Transform

MOST_WORKERS = 16
AHEAD = 2


@dataclass(frozen=True, eq=False)
class StreamSet:
    """What an `ImageSet` is, of images that stay in their files: `subset` and `batch` decode what is asked for.

    `rows` (N,) int64 are the images' numbers in `reader`. Its `boxes` are in the files' own pixels, and only say whose
    box is known; those of a `subset` are in pixels of its images. `bad` are the images (of 0 to N - 1) found unreadable
    so far, which `on_bad_image="skip"` leaves out.
    """

    reader: Reader
    rows: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    size: int
    shorter: int | None = None
    on_bad_image: str = "error"
    workers: int = 0
    bad: set[int] = field(default_factory=set)

    @classmethod
    def whole(
        cls, reader: Reader, labels: Tensor, classes: tuple[str, ...], size: int, on_bad_image: str
    ) -> StreamSet:
        """All that a reader has."""
        return cls(
            reader, torch.arange(len(reader)), labels, classes, size, on_bad_image=on_bad_image
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.size, self.size

    @property
    def boxes(self) -> Tensor | None:
        """(N, 4) int64, 0 0 0 0 where a box is not known."""
        return (
            None
            if self.reader.boxes is None
            else torch.from_numpy(self.reader.boxes[self.rows.numpy()])
        )

    def subset(self, indices: Tensor) -> ImageSet:
        """The images at `indices` (M,), decoded now; the unreadable ones left out or an error."""
        return self.load(indices)[0]

    def load(self, indices: Tensor) -> tuple[ImageSet, int]:
        """As `subset`, and how many unreadable images were left out."""
        return without_bad(*self._decode(indices.cpu()))

    def at(self, indices: Tensor) -> StreamSet:
        """The part of this set at `indices` (M,); nothing is decoded."""
        return replace(self, rows=self.rows[indices], labels=self.labels[indices], bad=set())

    def batch(self, indices: Tensor | Sequence[int] | slice) -> Tensor:
        """Images as uint8 (B, 3, H, W), channels_last in memory, decoded now; an unreadable one is black."""
        if isinstance(indices, slice):
            indices = torch.arange(len(self))[indices]
        return self._decode(torch.as_tensor(indices, dtype=torch.int64).cpu())[0].images.permute(
            0, 3, 1, 2
        )

    def _decode(self, indices: Tensor) -> tuple[ImageSet, NDArray[np.int64]]:
        rows, labels = self.rows[indices], self.labels[indices]
        return decode_rows(
            self.reader, rows, labels, self.classes, self.size, self.on_bad_image, self.shorter
        )

    def to(self, device: torch.device | str) -> StreamSet:
        """The same set: its images go to a device a batch at a time."""
        return self

    def batches(self, batch_size: int, pin: bool = False) -> Iterator[Tensor]:
        """All images in order, uint8 (B, 3, H, W), made by the workers; the last batch is filled up with the first."""
        starts = range(0, len(self), batch_size)
        order = (torch.arange(start, start + batch_size) % len(self) for start in starts)
        jobs = (_Job(index.numpy(), self.rows[index].numpy()) for index in order)
        for made in _load(self, Centre(self.shorter), jobs, batch_size, pin):
            self.check(made)
            yield made.images.permute(0, 3, 1, 2)

    def check(self, made: _Made) -> None:
        """Keeps account of unreadable images; an error unless they are to be skipped, and where there are no others."""
        if made.bad and (
            self.on_bad_image != "skip" or all(i in made.bad for i in made.index.tolist())
        ):
            raise UserError(made.bad[min(made.bad)])
        self.bad.update(made.bad)


class Stream:
    """Makes the batches of an epoch, as `Augment` does of resident images; `transform` is what is done to each.

    What is drawn depends on (seed, epoch) and on nothing else, so that any step of any epoch can be made at once.
    Each of several processes (`rank` of `world`) decodes its own share of a batch only.
    """

    shares = True

    def __init__(
        self,
        images: StreamSet,
        transform: Transform,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.images, self.transform = images, transform
        self.device, self.rank, self.world = torch.device(device), rank, world
        self._batches: Iterator[_Made] | None = None
        self._at: tuple[EpochPlan, int] | None = None

    def epoch(self, seed: int, epoch: int, batch_size: int, drop_last: bool = True) -> EpochPlan:
        """Draws one epoch; where images are cheap to read in blocks only, blocks are mixed, a window at a time."""
        generator, reader = seeded(seed, epoch), self.images.reader
        order = None
        if reader.blocks is not None:
            order = shuffled_blocks(reader.blocks[self.images.rows], reader.window, generator)
        transform = self.transform
        return draw_epoch(
            len(self.images),
            transform.padding,
            transform.flip,
            generator,
            batch_size,
            drop_last,
            order,
        )

    def batch(self, plan: EpochPlan, step: int) -> tuple[Tensor, Tensor]:
        """This process's share of batch `step`: images uint8 (B, 3, H, W), channels_last, and labels (B,).

        Steps in a row come from workers that are ahead; any other one starts them anew, there.
        """
        if not 0 <= step < len(plan):
            raise IndexError(f"step {step} is outside of the epoch's {len(plan)} batches")
        if (
            self._batches is None
            or self._at is None
            or self._at[0] is not plan
            or self._at[1] != step
        ):
            self._batches = None
            jobs = (self._job(plan, k) for k in range(step, len(plan)))
            pin = self.device.type == "cuda"
            self._batches = _load(
                self.images, self.transform, jobs, -(-plan.batch_size // self.world), pin
            )
        made = next(self._batches)
        self._at = (plan, step + 1)
        if step + 1 == len(plan):
            self._batches = None  # the workers end
        self.images.check(made)
        labels = self.images.labels[torch.from_numpy(made.index)]
        if self.device.type == "cuda":
            labels = labels.pin_memory()
        x = made.images.permute(0, 3, 1, 2).to(self.device, non_blocking=True)
        return x, labels.to(self.device, non_blocking=True)

    def describe(self, batch_size: int) -> str:
        """Who decodes, in a few words."""
        wanted = self.images.workers
        workers = _fitting(wanted, self._batch_bytes(batch_size))
        who = f"by {workers} worker{'s' * (workers != 1)}" if workers else "between the steps"
        if workers < wanted:
            who += f" (/dev/shm has no room for {wanted} workers' batches: give a container more, --shm-size 8g)"
        return f"images decoded while training, {who}"

    def _batch_bytes(self, batch_size: int) -> int:
        return -(-batch_size // self.world) * self.images.size**2 * 3

    def _job(self, plan: EpochPlan, step: int) -> _Job:
        here = torch.arange(
            step * plan.batch_size, min((step + 1) * plan.batch_size, len(plan.order))
        )
        if self.world > 1:
            here = here[self.rank : len(here) // self.world * self.world : self.world]
        index = plan.order[here]
        assert plan.noise is not None
        drawn = [values[here].tolist() for values in (plan.dy, plan.dx, plan.flip, plan.noise)]
        return _Job(index.numpy(), self.images.rows[index].numpy(), list(zip(*drawn, strict=True)))


def shuffled_blocks(blocks: Tensor, window: int, generator: torch.Generator) -> Tensor:
    """An order of images (N,) in which `window` random blocks at a time are mixed with one another."""
    kinds, block = torch.unique(blocks, return_inverse=True)
    turn = torch.randperm(len(kinds), generator=generator)[block] // max(1, window)
    shuffled = torch.randperm(len(blocks), generator=generator)
    return shuffled[torch.argsort(turn[shuffled], stable=True)]


def usual_workers(on_cpu: bool, processes: int = 1) -> int:
    """Where nobody says: what the training leaves of this process's share of the cores."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ) // processes
    # Trained on the CPU, a network keeps the cores busier than decoding does.
    return max(1, min(MOST_WORKERS, cores // 8 if on_cpu else cores - 1))


@dataclass(frozen=True)
class _Job:
    """One batch to make: the images' numbers in the set and in the reader, and what was drawn for each."""

    index: NDArray[np.int64]
    rows: NDArray[np.int64]
    drawn: list[tuple[int, int, bool, int]] | None = None


@dataclass(frozen=True)
class _Made:
    """A batch (B, H, W, 3), the number in the set of each image, and what is wrong with those that could not be read.

    In the place of an unreadable image there is another one of the batch.
    """

    images: Tensor
    index: NDArray[np.int64]
    bad: dict[int, str]

    def pin_memory(self) -> _Made:
        return _Made(self.images.pin_memory(), self.index, self.bad)


class _Maker(torch.utils.data.Dataset[Any]):
    """What a worker does: a job to a batch."""

    def __init__(self, images: StreamSet, transform: Transform) -> None:
        self.reader, self.size, self.transform = images.reader, images.size, transform

    def __getitem__(self, job: _Job) -> _Made:
        out = np.zeros((len(job.rows), self.size, self.size, 3), dtype=np.uint8)
        index, good, bad = job.index.copy(), [], {}
        for k, row in enumerate(job.rows.tolist()):
            draw = Draw() if job.drawn is None else Draw(*job.drawn[k])
            try:
                self.transform(out[k], self.reader.encoded(row), draw)
                good.append(k)
            except MemoryError:
                raise
            except Exception as error:
                # Decoders raise nearly anything on damaged input.
                bad[k] = unreadable(self.reader.place(row), error)
        for k in bad if good else ():
            other = good[k % len(good)]
            out[k], index[k] = out[other], index[other]
        return _Made(
            torch.from_numpy(out), index, {int(job.index[k]): why for k, why in bad.items()}
        )


def _load(
    images: StreamSet, transform: Transform, jobs: Iterator[_Job], batch_size: int, pin: bool
) -> Iterator[_Made]:
    """The batches of `jobs`, in their order, from worker processes (or from this one where there are none)."""
    workers = _fitting(images.workers, batch_size * images.size * images.size * 3)
    loader = torch.utils.data.DataLoader(
        _Maker(images, transform),
        batch_size=None,
        sampler=jobs,  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        pin_memory=pin,
        worker_init_fn=_begin_worker if workers else None,
        # Else it draws from torch's global generator, whose state belongs to the training.
        generator=torch.Generator(),
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "worker" not in str(error):
            raise
        raise RunError(
            f"a worker that decodes images died ({str(error).splitlines()[0]}): "
            "run the command again with fewer --workers or a smaller --batch-size"
        ) from error


def _fitting(workers: int, batch_bytes: int) -> int:
    """So many of `workers` as have room for their batches in shared memory, which containers are often short of."""
    shared = Path("/dev/shm")
    if not workers or not shared.is_dir():
        return workers
    return min(
        workers, int(0.8 * shutil.disk_usage(shared).free) // ((AHEAD + 1) * max(1, batch_bytes))
    )


def _begin_worker(number: int) -> None:
    """Ctrl-C and a job's end come to all processes of a group; until its state is saved the training needs these."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def once(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, once)
