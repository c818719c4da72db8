"""Small images and data folders that the tests make themselves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakePicture = Callable[..., Image.Image]
MakeFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def arrow_cache(tmp_path_factory, monkeypatch):
    """Keeps the copies of Hugging Face's `datasets` out of the user's cache."""
    cache = tmp_path_factory.mktemp("arrow")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))  # for other processes
    if "datasets" in sys.modules:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)


@pytest.fixture
def picture() -> MakePicture:
    """A random RGB picture of a width and height; equal seeds give equal pixels."""

    def make(width: int = 8, height: int = 8, seed: int = 0) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return make


@pytest.fixture
def make_folder(tmp_path: Path, picture: MakePicture) -> MakeFolder:
    """train/ and val/ of PNG files, so many images a class."""

    def make(
        classes: tuple[str, ...] = ("cat", "dog"), train: int = 4, val: int = 2, side: int = 8
    ) -> Path:
        root = tmp_path / "pets"
        for part, count in (("train", train), ("val", val)):
            for label, name in enumerate(classes):
                (root / part / name).mkdir(parents=True)
                for i in range(count):
                    seed = 1000 * label + 10 * i + (part == "val")
                    picture(side, side, seed).save(root / part / name / f"{i}.png")
        return root

    return make
