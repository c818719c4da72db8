"""`bench data`: images/s of augmentation in memory, and of JPEGs decoded and cropped to 224 px.

In memory, on one core: `authors` is their PIL loop on images of CIFAR's size, `resident` is ours;
both make normalised float batches. From JPEGs, with a worker for every core: decoding, a random
resized crop of 224 px and a flip, to uint8. `loader authors 224` is torchvision's transforms on PIL
images, as in their ImageNet script; it is the baseline of ours. `per_core` is the rate divided by
the number of cores used.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..apply.inference import as_input
from ..data.augment import Augment
from ..data.decode import available_cores
from ..data.image_folder import find_images
from ..data.images import ImageSet
from ..data.open import open_data
from ..data.options import AugmentOptions
from ..data.reader import FileReader
from ..data.stream import Stream, StreamSet
from ..data.transforms import make_transform
from ..errors import UserError
from ..models.trained import Preprocess
from ..runtime.process import use_threads
from .authors import MEAN, STD, authors_loader
from .measure import Measure, interleave, report, timed
from .options import BenchOptions
from .workload import start

SIZE = 224
AUGMENT = AugmentOptions(augment="imagenet")
SCALE, RATIO = AUGMENT.crop_scale, AUGMENT.crop_ratio  # torchvision's defaults
AUTHORS = "loader authors 224"
PHOTOGRAPHS = 24  # number of JPEGs to generate if no folder is given
# Batches of each worker: the first ones until every worker is running, then the timed ones.
WARM_UP_BATCHES, TIMED_BATCHES = 2, 4

Decode = Callable[[bytes], Any]  # a JPEG's bytes -> (224, 224, 3) uint8


def run(options: BenchOptions, console: Console, json_file: Path | None) -> None:
    """Each measurement in memory has `--steps` batches; each worker loads 1/16 of their images."""
    runtime, _ = start(options)
    images = open_data("digits", limit_train=options.images, limit_val=10).train
    assert isinstance(images, ImageSet), "the digits are in memory"
    batch = loader_batch(options)
    cores = available_cores()
    # One thread per process: the libraries have different defaults.
    with jpeg_files(options.data) as files, use_threads(1):
        measures = {
            "authors": _authors(images, options),
            "resident": _resident(images, options),
            AUTHORS: loading(partial(authors_batches, files, batch), batch, cores),
            "loader torchvision 224": loading(partial(stream_batches, files, batch), batch, cores),
        }
        baselines = {name: AUTHORS for name in measures if name.endswith("224")}
        rows = interleave(measures, options.rounds, baselines)
    for row in rows:
        workers = cores if row.name.startswith("loader") else 1
        row.extra["per_core"] = row.median / workers
    notes = [f"{len(files)} JPEGs, {cores} cores"]
    report("data", rows, options, runtime, console, json_file, notes)


def loader_batch(options: BenchOptions) -> int:
    """Images per batch of a loader: large images take about 16 times as long as small ones."""
    return max(1, options.steps * options.batch_size // 16 // TIMED_BATCHES)


@contextmanager
def jpeg_files(folder: str | None) -> Iterator[list[Path]]:
    """The JPEGs below a folder; without a folder, crops of scikit-learn's two photographs.

    Raises:
        UserError: for a folder without JPEGs.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield _crop_photographs(Path(temporary))
        return
    files = [f for f in find_images(Path(folder)) if f.suffix.lower() in (".jpg", ".jpeg")]
    if not files:
        raise UserError(
            f"--data is {folder!r}: expected a folder with JPEGs, files ending in .jpg or .jpeg"
        )
    yield files


def _crop_photographs(folder: Path) -> list[Path]:
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = cycle([Image.fromarray(pixels) for pixels in load_sample_images().images])
    files = []
    for k, photograph in zip(range(PHOTOGRAPHS), photographs, strict=False):
        x, y = 5 * k, 2 * k
        files.append(folder / f"{k:02d}.jpg")
        # 500×375 is the most common size in ImageNet.
        photograph.crop((x, y, x + 500, y + 375)).save(files[-1], quality=90)
    return files


def _authors(images: ImageSet, options: BenchOptions) -> Measure:
    data = (images.images.numpy(), images.labels.numpy())
    batches = authors_loader(data, options.batch_size, workers=0)
    return timed(lambda: next(batches), options.steps, options.batch_size)


def _resident(images: ImageSet, options: BenchOptions) -> Measure:
    augment, normalise = Augment(images), Preprocess(MEAN, STD)
    # The crops of an epoch are drawn once; its steps are repeated when it ends.
    plan = augment.epoch(0, 0, options.batch_size)
    steps = cycle(range(len(plan)))

    def make_batch() -> None:
        normalise(as_input(augment.batch(plan, next(steps))[0]))

    return timed(make_batch, options.steps, options.batch_size)


def decode_with_pillow() -> Decode:
    from PIL import Image
    from torchvision import transforms as T

    transform = T.Compose([T.RandomResizedCrop(SIZE, SCALE, RATIO), T.RandomHorizontalFlip()])
    return lambda data: np.asarray(transform(Image.open(io.BytesIO(data)).convert("RGB")))


def loading(load: Callable[[int, int], Iterator[object]], batch: int, workers: int) -> Measure:
    """Measures `load(number of batches, workers)` once every worker is running."""

    def measure() -> float:
        first, rest = WARM_UP_BATCHES * workers, TIMED_BATCHES * workers
        batches = load(first + rest, workers)
        for _ in islice(batches, first):
            pass
        start = time.perf_counter()
        # Load all batches: a worker that is still running would slow the next row.
        for _ in batches:
            pass
        return rest * batch / (time.perf_counter() - start)

    return measure


class _AuthorsFiles(Dataset[Tensor]):
    """`count` images of their ImageNet loader."""

    def __init__(self, files: Sequence[Path], count: int):
        self.files, self.count = files, count
        self.decode = decode_with_pillow()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Tensor:
        # A copy, since Pillow's array is read-only.
        return torch.from_numpy(self.decode(self.files[i % len(self.files)].read_bytes()).copy())


def authors_batches(files: list[Path], batch: int, count: int, workers: int) -> Iterator[object]:
    return iter(DataLoader(_AuthorsFiles(files, count * batch), batch, num_workers=workers))


def stream_batches(files: list[Path], batch: int, count: int, workers: int) -> Iterator[object]:
    """Batches of `Stream`, as in a run."""
    reader = FileReader(Path(os.path.commonpath([file.parent for file in files])), files)
    labels = torch.zeros(len(files), dtype=torch.int64)
    rows = torch.arange(count * batch) % len(files)
    images = StreamSet(reader, rows, labels[rows], ("any",), SIZE, workers=workers)
    stream = Stream(images, make_transform(AUGMENT, SIZE))
    plan = stream.epoch(0, 0, batch)
    return (stream.batch(plan, step) for step in range(count))
