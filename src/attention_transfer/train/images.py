"""The images of a run: in memory, or streamed if they do not fit."""

from __future__ import annotations

import torch

from ..data.augment import Augment
from ..data.dataset import Dataset, Images
from ..data.decode import memory_budget
from ..data.images import ImageSet
from ..data.open import open_data
from ..data.options import AugmentOptions, DataOptions
from ..data.stream import Stream, default_workers
from ..data.transforms import make_transform, val_resize
from ..runtime.options import RuntimeOptions
from ..runtime.process import local_rank

# Share of the GPU's free memory for resident images; training needs the rest.
GPU_SHARE = 0.4


def open_images(
    options: DataOptions,
    augment: str,
    machine: RuntimeOptions,
    seed: int,
    *,
    streamed: bool | None = None,
    jobs: int = 1,
) -> Dataset:
    """The images of a run, in memory or streamed.

    Args:
        streamed: for a run that continues, whether its images were streamed.
        jobs: number of runs that share this machine.
    """
    stream: str = options.stream
    if stream == "auto" and streamed is False:
        stream = "off"
    elif stream == "auto" and (streamed or augment == "imagenet"):
        # A random resized crop needs the whole image, and memory holds one size of it.
        stream = "on"
    on_gpu = machine.device in ("auto", "cuda") and torch.cuda.is_available()
    processes = machine.devices * jobs
    workers = options.workers
    if workers is None:
        workers = default_workers(on_cpu=not on_gpu, processes=processes)
    memory = []  # bytes for decoded images, on the GPU and in the machine
    if on_gpu:
        free, _ = torch.cuda.mem_get_info(local_rank())
        # Each process has its own GPU, which it shares with other jobs only.
        memory.append(int(GPU_SHARE * free) // jobs)
    if (share := memory_budget()) is not None:
        memory.append(share // processes)
    return open_data(
        options,
        seed=seed,
        stream=stream,
        workers=workers,
        val_resize=val_resize(augment),
        memory=min(memory, default=None),
    )


def make_loader(
    options: AugmentOptions,
    images: Images,
    device: torch.device | str,
    rank: int = 0,
    world: int = 1,
) -> Augment | Stream:
    """The loader of the training batches, from memory or decoded while training.

    `rank` of `world` is the process that the batches are for.
    """
    if isinstance(images, ImageSet):
        return Augment(images.to(device), options.crop_padding, options.flip, options.views)
    transform = make_transform(options, images.size)
    return Stream(images, transform, device, rank, world, options.views)
