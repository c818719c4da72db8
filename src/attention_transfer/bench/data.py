"""`bench data`: images/s of augmentation in memory, and of decoding JPEGs and cutting 224 px from them.

In memory: `authors` is their PIL loop on CIFAR's size, `resident` ours, both to normalised float batches. From JPEGs:
decoding, a random resized crop of 224, a flip, to uint8; `authors 224` is torchvision's transforms on PIL images, as
their ImageNet script has them. All on one core, but the rows `loader`, which have a worker (with DALI a thread) for
every core; `per_core` is the rate over the cores at work. Ratios of the rows from JPEGs are to `authors 224`. A library
that is not installed has no row and is named below the table.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from torch.utils.data import DataLoader

from ..apply.inference import as_input
from ..data import Augment, ImageSet, Stream, StreamSet, make_transform, open_data
from ..data.options import AugmentOptions
from ..data.reader import FileReader
from ..errors import UserError
from ..models import Preprocess
from ..runtime.process import set_up_process
from ..runtime.resolve import resolve_runtime
from .authors import AuthorsImages
from .decoders import AUTHORS, SIZE, AuthorsFiles, dali_pipeline, decoders, is_simd
from .measure import Timed, interleave, report
from .speed import Settings, about, recipe_of

JPEGS = (".jpg", ".jpeg")
MADE = 24  # JPEGs where no folder is given
STARTING, TIMED = (
    2,
    4,
)  # batches a worker: those that pass until all are at work, and those that are timed


def bench_data(settings: Settings, console: Console, file: Path | None) -> None:
    """Every way, interleaved; `--steps` batches a measurement in memory, a sixteenth of their images from JPEGs."""
    if settings.images < settings.batch_size:
        raise UserError(
            f"--images is {settings.images}: expected at least one batch of {settings.batch_size}"
        )
    runtime = set_up_process(resolve_runtime(recipe_of(settings, "none")))
    threads, cores = torch.get_num_threads(), cores_here()
    with _jpegs(settings.data) as files:
        images = open_data("digits", limit_train=settings.images, limit_val=10).train
        assert isinstance(images, ImageSet), "the digits are in memory"
        timed: dict[str, Timed] = {
            "authors": _authors(images, settings),
            "resident": _resident(images, settings),
        }
        count = max(1, settings.steps * settings.batch_size // 16)
        found, absent = decoders()
        for name, decode in found.items():
            timed[name] = _each(decode, files, count)
        batch = max(1, count // TIMED)
        timed["loader authors 224"] = _loader(partial(_theirs, files, batch), batch, cores)
        timed["loader torchvision 224"] = _loader(partial(_stream, files, batch), batch, cores)
        if find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None:
            timed["loader dali 224"] = _loader(partial(_dali, files, batch), batch, cores)
        else:
            absent.append("loader dali 224")
        torch.set_num_threads(1)
        try:
            for run in timed.values():
                run()
            rows = interleave(
                timed, settings.rounds, {name: AUTHORS for name in timed if name.endswith("224")}
            )
        finally:
            torch.set_num_threads(threads)
    for row in rows:
        row.more["per_core"] = row.to_dict()["median"] / (
            cores if row.name.startswith("loader") else 1
        )
    more = {"files": len(files), "cores": cores, "pillow_simd": is_simd()}
    report(
        "data",
        rows,
        about(settings, runtime) | more,
        console,
        file,
        [f"{n}: not installed" for n in absent],
    )


def cores_here() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _jpegs(folder: str | None) -> Iterator[list[Path]]:
    """The JPEGs below a folder, or some that are cut from scikit-learn's two photographs."""
    if folder is not None:
        if not Path(folder).is_dir():
            raise UserError(f"--data is {folder!r}: expected a folder of JPEGs")
        files = sorted(f for f in Path(folder).rglob("*") if f.suffix.lower() in JPEGS)
        if not files:
            raise UserError(
                f"--data is {folder!r}, which has no JPEG in it: expected files ending in .jpg or .jpeg"
            )
        yield files
        return
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(p) for p in load_sample_images().images]
    with tempfile.TemporaryDirectory() as temporary:
        files = []
        for k in range(MADE):
            photograph = photographs[k % len(photographs)]
            x, y = 5 * k, 2 * k
            files.append(Path(temporary) / f"{k:02d}.jpg")
            # 500×375 is the commonest size in ImageNet.
            photograph.crop((x, y, x + 500, y + 375)).save(files[-1], quality=90)
        yield files


def _authors(images: ImageSet, settings: Settings) -> Timed:
    theirs = AuthorsImages(images.images.numpy(), images.labels.numpy())
    loader = DataLoader(theirs, settings.batch_size, shuffle=True, drop_last=True)
    steps = min(settings.steps, len(loader))

    def rate() -> float:
        start = time.perf_counter()
        for _ in islice(loader, steps):
            pass
        return steps * settings.batch_size / (time.perf_counter() - start)

    return rate


def _resident(images: ImageSet, settings: Settings) -> Timed:
    augment = Augment(images)
    normalise = Preprocess([0.49, 0.48, 0.45], [0.25, 0.24, 0.26])
    plan = augment.epoch(0, 0, settings.batch_size)

    def rate() -> float:
        start = time.perf_counter()
        for step in range(settings.steps):
            normalise(as_input(augment.batch(plan, step % len(plan))[0]))
        return settings.steps * settings.batch_size / (time.perf_counter() - start)

    return rate


def _each(decode: Callable[[bytes], object], files: list[Path], count: int) -> Timed:
    encoded = [f.read_bytes() for f in files]

    def rate() -> float:
        torch.manual_seed(0)  # the same crops for all
        start = time.perf_counter()
        for k in range(count):
            decode(encoded[k % len(encoded)])
        return count / (time.perf_counter() - start)

    return rate


def _loader(make: Callable[[int, int], Iterator[object]], batch: int, cores: int) -> Timed:
    """Batches made by workers, from the moment on when each of them is at work."""

    def rate() -> float:
        begun, timed = STARTING * cores, TIMED * cores
        batches = make(begun + timed, cores)
        for _ in islice(batches, begun):
            pass
        start = time.perf_counter()
        for _ in batches:  # to the end, so that no worker is left that would slow the next row
            pass
        return timed * batch / (time.perf_counter() - start)

    return rate


def _theirs(files: list[Path], batch: int, count: int, cores: int) -> Iterator[object]:
    return iter(DataLoader(AuthorsFiles(files, count * batch), batch, num_workers=cores))


def _stream(files: list[Path], batch: int, count: int, cores: int) -> Iterator[object]:
    reader = FileReader(
        files[0].parent if len(files) == 1 else Path(os.path.commonpath(files)), files
    )
    labels = torch.zeros(len(files), dtype=torch.int64)
    rows = torch.arange(count * batch) % len(files)
    images = StreamSet(reader, rows, labels[rows], ("any",), SIZE, workers=cores)
    stream = Stream(images, make_transform(AugmentOptions(augment="imagenet"), SIZE))
    plan = stream.epoch(0, 0, batch)
    return (stream.batch(plan, step) for step in range(count))


def _dali(files: list[Path], batch: int, count: int, cores: int) -> Iterator[object]:
    pipeline = dali_pipeline(files, batch, cores)
    return (pipeline.run() for _ in range(count))
