"""One JPEG to a random 224 px crop, by every library that is there: decoded, cut, resized, flipped, RGB uint8."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.options import AugmentOptions
from ..data.transforms import AugmentDraw, make_transform

SIZE = 224
SCALE, RATIO = AugmentOptions.crop_scale, AugmentOptions.crop_ratio
AUTHORS = "authors 224"
OURS = "torchvision 224"
# A row's name and the module that it takes.
OTHERS = {"simplejpeg 224": "simplejpeg", "opencv 224": "cv2"}

Decode = Callable[[bytes], Any]


def decoders() -> tuple[dict[str, Decode], list[str]]:
    """Functions from a JPEG's bytes to (224, 224, 3) uint8 by name, and the names of those that are not installed.

    Pillow's `authors 224` says which Pillow it is: pillow-simd takes its place, so that both cannot be had at once.
    """
    makers = {"simplejpeg 224": with_simplejpeg, "opencv 224": with_opencv}
    there = [name for name, module in OTHERS.items() if find_spec(module) is not None]
    found: dict[str, Decode] = {AUTHORS: with_pillow(), OURS: with_torchvision()}
    found |= {name: makers[name]() for name in there}
    absent = [name for name in OTHERS if name not in there]
    return found, absent if is_simd() else [*absent, "pillow-simd"]


def is_simd() -> bool:
    """Whether the Pillow that is installed is pillow-simd."""
    import PIL

    return ".post" in PIL.__version__


def with_pillow() -> Decode:
    from PIL import Image
    from torchvision import transforms as T

    transform = T.Compose([T.RandomResizedCrop(SIZE, SCALE, RATIO), T.RandomHorizontalFlip()])

    def decode(data: bytes) -> NDArray[np.uint8]:
        return np.asarray(transform(Image.open(io.BytesIO(data)).convert("RGB")))

    return decode


def with_torchvision() -> Decode:
    """What a stream's workers do."""
    transform = make_transform(AugmentOptions(augment="imagenet"), SIZE)

    def decode(data: bytes) -> NDArray[np.uint8]:
        out = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
        transform(out, data, AugmentDraw(noise=int(torch.randint(1 << 31, ()))))
        return out

    return decode


def with_simplejpeg() -> Decode:
    """Another decoder before the same crop, by torchvision."""
    import simplejpeg
    from torchvision.transforms import v2

    transform = v2.Compose(
        [v2.RandomResizedCrop(SIZE, SCALE, RATIO, antialias=True), v2.RandomHorizontalFlip()]
    )

    def decode(data: bytes) -> Tensor:
        picture = torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB"))
        return transform(picture.permute(2, 0, 1)).permute(1, 2, 0).contiguous()

    return decode


def with_opencv() -> Decode:
    """Its own decoder and resizing: by area where it shrinks, which is its antialiasing."""
    import cv2
    from torchvision.transforms import RandomResizedCrop

    def decode(data: bytes) -> NDArray[np.uint8]:
        cv2.setNumThreads(1)
        picture = cv2.cvtColor(
            cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB
        )
        shape = torch.empty(0, *picture.shape[:2])  # only its last two sizes are read
        top, left, height, width = RandomResizedCrop.get_params(shape, list(SCALE), list(RATIO))
        way = cv2.INTER_AREA if min(height, width) >= SIZE else cv2.INTER_LINEAR
        made = cv2.resize(
            picture[top : top + height, left : left + width], (SIZE, SIZE), interpolation=way
        )
        return cv2.flip(made, 1) if torch.rand(()) < 0.5 else made

    return decode


class AuthorsFiles(torch.utils.data.Dataset[Tensor]):
    """Their ImageNet loader's images: PIL, a random crop of 224 and a flip, one after the other, `count` of them."""

    def __init__(self, files: Sequence[Path], count: int) -> None:
        self.files, self.count = files, count
        self.decode = with_pillow()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Tensor:
        return torch.from_numpy(self.decode(self.files[i % len(self.files)].read_bytes()).copy())


def dali_pipeline(files: Sequence[Path], batch: int, threads: int) -> Any:
    """NVIDIA's DALI on the CPU: it decodes only what the crop needs."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=2)
    def pipeline() -> Any:
        encoded, _ = fn.readers.file(
            files=[str(f) for f in files], random_shuffle=True, name="files"
        )
        area, ratio = list(SCALE), list(RATIO)
        x = fn.decoders.image_random_crop(
            encoded, device="cpu", random_area=area, random_aspect_ratio=ratio
        )
        x = fn.resize(x, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(x, horizontal=fn.random.coin_flip())

    made = pipeline()
    made.build()
    return made
