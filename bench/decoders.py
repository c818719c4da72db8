"""Measures how fast each library decodes JPEGs: decoding, crop to 224 px, resize, flip, RGB uint8.

    python bench/decoders.py --rounds 5 --data FOLDER --json results/bench/decoders.json

`authors 224`, torchvision's transforms on PIL images, is the baseline. All run on one core, except
the rows `loader`, which have a worker (with DALI a thread) for every core; `per_core` is the rate
divided by the number of cores used. For a library that is not installed, a note replaces the row.
pillow-simd replaces Pillow in an environment, so that one run measures only one of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import main
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from attention_transfer.bench import BenchOptions
from attention_transfer.bench.data import (
    AUGMENT,
    RATIO,
    SCALE,
    SIZE,
    TIMED_BATCHES,
    Decode,
    authors_batches,
    available_cores,
    decode_with_pillow,
    jpeg_files,
    loader_batch,
    loading,
    stream_batches,
)
from attention_transfer.bench.measure import Measure, interleave, report, timed
from attention_transfer.bench.workload import start
from attention_transfer.data.transforms import AugmentDraw, make_transform
from attention_transfer.runtime.process import use_threads

BASELINE = "authors 224"


def run(options: BenchOptions, console: Console, json_file: Path | None) -> None:
    """Each library that is installed; images are a sixteenth of `--steps` batches."""
    runtime, _ = start(options)
    batch, cores = loader_batch(options), available_cores()
    count = TIMED_BATCHES * batch
    notes = []
    with jpeg_files(options.data) as files, use_threads(1):
        measures = {}
        for name, (module, make) in DECODERS.items():
            if find_spec(module) is None:
                notes.append(f"{name}: not installed")
            else:
                measures[name] = decoding(make(), files, count)
        loaders = {"authors": authors_batches, "torchvision": stream_batches}
        for name, load in loaders.items():
            measures[f"loader {name} 224"] = loading(partial(load, files, batch), batch, cores)
        if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
            notes.append("loader dali 224: not installed")
        else:
            measures["loader dali 224"] = loading(partial(dali_batches, files, batch), batch, cores)
        rows = interleave(measures, options.rounds, dict.fromkeys(measures, BASELINE))
    for row in rows:
        workers = cores if row.name.startswith("loader") else 1
        row.extra["per_core"] = row.median / workers
    notes.append(f"pillow-simd: {'yes' if is_pillow_simd() else 'not installed'}")
    report("decoders", rows, options, runtime, console, json_file, notes)


def decoding(decode: Decode, files: Sequence[Path], count: int) -> Measure:
    """Measures `count` images, one after the other."""
    encoded = [file.read_bytes() for file in files]

    def decode_all() -> None:
        torch.manual_seed(0)  # the same crops in every row
        for data in islice(cycle(encoded), count):
            decode(data)

    return timed(decode_all, 1, count)


def is_pillow_simd() -> bool:
    """Whether the installed Pillow is pillow-simd."""
    import PIL

    return ".post" in PIL.__version__


def decode_with_torchvision() -> Decode:
    """As the workers of a stream do."""
    transform = make_transform(AUGMENT, SIZE)

    def decode(data: bytes) -> NDArray[np.uint8]:
        out = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
        transform(out, data, AugmentDraw(noise=int(torch.randint(1 << 31, ()))))
        return out

    return decode


def decode_with_simplejpeg() -> Decode:
    """Another decoder, then the same crop by torchvision."""
    import simplejpeg
    from torchvision.transforms import v2

    transform = v2.Compose(
        [v2.RandomResizedCrop(SIZE, SCALE, RATIO, antialias=True), v2.RandomHorizontalFlip()]
    )

    def decode(data: bytes) -> Tensor:
        image = torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB"))
        return transform(image.permute(2, 0, 1)).permute(1, 2, 0).contiguous()

    return decode


def decode_with_opencv() -> Decode:
    """Its own decoder and resizing; INTER_AREA is its antialiasing, for crops that shrink."""
    import cv2
    from torchvision.transforms import RandomResizedCrop

    cv2.setNumThreads(1)

    def decode(data: bytes) -> NDArray[np.uint8]:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        shape = torch.empty(0, *image.shape[:2])  # get_params reads the last two sizes only
        top, left, height, width = RandomResizedCrop.get_params(shape, list(SCALE), list(RATIO))
        interpolation = cv2.INTER_LINEAR
        if min(height, width) >= SIZE:
            interpolation = cv2.INTER_AREA
        crop = image[top : top + height, left : left + width]
        crop = cv2.resize(crop, (SIZE, SIZE), interpolation=interpolation)
        return cv2.flip(crop, 1) if torch.rand(()) < 0.5 else crop

    return decode


# The name of a row, the module that it needs, and the function that makes its decoder.
DECODERS: dict[str, tuple[str, Callable[[], Decode]]] = {
    BASELINE: ("PIL", decode_with_pillow),
    "torchvision 224": ("torchvision", decode_with_torchvision),
    "simplejpeg 224": ("simplejpeg", decode_with_simplejpeg),
    "opencv 224": ("cv2", decode_with_opencv),
}


def dali_batches(files: Sequence[Path], batch: int, count: int, threads: int) -> Iterator[object]:
    """NVIDIA's DALI on the CPU, which decodes only what the crop needs."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=2)
    def make_pipeline() -> Any:
        names = [str(file) for file in files]
        encoded, _ = fn.readers.file(files=names, random_shuffle=True, name="files")
        area, ratio = list(SCALE), list(RATIO)
        x = fn.decoders.image_random_crop(
            encoded, device="cpu", random_area=area, random_aspect_ratio=ratio
        )
        x = fn.resize(x, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(x, horizontal=fn.random.coin_flip())

    pipeline = make_pipeline()
    pipeline.build()
    return (pipeline.run() for _ in range(count))


if __name__ == "__main__":
    main(__doc__, run)
