"""The built-in data: a whole handwritten digit in a scene cluttered with fragments of others."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .images import ImageSet, stratified_split
from .source import Source

# Sides in pixels.
SCENE = 32
DIGIT = 14
FRAGMENTS = 8  # number of distractors: parts of other digits
FRAGMENT = 7
NOISE = 0.1  # standard deviation, in [0, 1] units
TRAIN_SCENES = 12_000
VAL_SCENES = 2_000
VAL_SOURCES = 0.2  # share of the source digits
# The scenes are the same for every run and seed.
SCENES_SEED = 2017


def open_digits() -> Source:
    """Scenes (N, 32, 32, 3); training and validation scenes share no source digit."""
    digits, labels = source_digits()
    classes = tuple(str(i) for i in range(10))
    sets = []
    for k, (count, sources) in enumerate(
        zip((TRAIN_SCENES, VAL_SCENES), split_sources(labels), strict=True)
    ):
        images, targets, boxes = make_scenes(
            digits[sources.numpy()], labels[sources].numpy(), count, SCENES_SEED + k
        )
        sets.append(ImageSet(images, targets, classes, boxes))
    return Source(train=sets[0], val=sets[1])


def source_digits() -> tuple[NDArray[np.float32], Tensor]:
    """The 1,797 digits enlarged to (1797, 14, 14) in [0, 1], and their labels int64 (1797,)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # The pixels of scikit-learn's digits go from 0 to 16.
    small = torch.from_numpy(bunch.images / 16.0)[:, None]
    large = torch.nn.functional.interpolate(
        small, size=(DIGIT, DIGIT), mode="bilinear", align_corners=False
    )
    return large[:, 0].float().numpy(), torch.from_numpy(bunch.target).long()


def split_sources(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the source digits of training and validation scenes: stratified, disjoint."""
    return stratified_split(labels, VAL_SOURCES, SCENES_SEED)


def make_scenes(
    digits: NDArray[np.float32], labels: NDArray[np.int64], count: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scenes uint8 (count, 32, 32, 3), labels int64 (count,) and boxes int64 (count, 4).

    A box is the tightest one around the ink of the whole digit.

    Args:
        digits: float32 (M, 14, 14) in [0, 1].
        labels: int64 (M,).
    """
    rng = np.random.default_rng(seed)
    # Classes are exactly balanced; within a class every source digit is equally likely.
    targets = rng.permutation(np.arange(count) % 10)
    by_class = np.argsort(labels, kind="stable")
    per_class = np.bincount(labels, minlength=10)
    within = (rng.random(count) * per_class[targets]).astype(np.int64)
    source = by_class[(np.cumsum(per_class) - per_class)[targets] + within]

    scenes = np.zeros((count, SCENE, SCENE), dtype=np.float32)
    corner = rng.integers(0, SCENE - DIGIT + 1, size=(count, 2))
    _paste(scenes, digits[source] * _intensity(rng, count), corner)
    for _ in range(FRAGMENTS):
        # An offset of at least 1 takes the fragment from another source digit.
        other = (source + rng.integers(1, len(digits), size=count)) % len(digits)
        cut = rng.integers(0, DIGIT - FRAGMENT + 1, size=(count, 2))
        fragment = digits[(other[:, None, None], *_window(cut, FRAGMENT))]
        place = rng.integers(0, SCENE - FRAGMENT + 1, size=(count, 2))
        _paste(scenes, fragment * _intensity(rng, count), place)
    scenes += NOISE * rng.standard_normal(scenes.shape, dtype=np.float32)
    grey = (scenes.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    images = torch.from_numpy(grey)[..., None].expand(-1, -1, -1, 3).contiguous()
    # A corner is y, x; a box is x0, y0, x1, y1.
    boxes = _ink_boxes(digits)[source] + np.tile(corner[:, ::-1], 2)
    return images, torch.from_numpy(targets), torch.from_numpy(boxes)


def _intensity(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    return rng.uniform(0.6, 1.0, size=(count, 1, 1)).astype(np.float32)


def _window(corner: NDArray[np.int64], side: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column indices of a square at each `corner` (N, 2) given as y, x."""
    steps = np.arange(side)
    return corner[:, 0, None, None] + steps[:, None], corner[:, 1, None, None] + steps


def _paste(
    scenes: NDArray[np.float32], patches: NDArray[np.float32], corner: NDArray[np.int64]
) -> None:
    """Pastes by the maximum of scene and patch, so that no later patch hides the digit."""
    index = (np.arange(len(scenes))[:, None, None], *_window(corner, patches.shape[-1]))
    scenes[index] = np.maximum(scenes[index], patches)


def _ink_boxes(digits: NDArray[np.float32]) -> NDArray[np.int64]:
    """x0, y0, x1, y1 (half-open) of the pixels of each digit that are not black."""
    ink = digits > 0
    rows, columns = np.asarray(ink.any(axis=2)), np.asarray(ink.any(axis=1))
    x0, y0 = columns.argmax(axis=1), rows.argmax(axis=1)
    x1, y1 = DIGIT - columns[:, ::-1].argmax(axis=1), DIGIT - rows[:, ::-1].argmax(axis=1)
    return np.stack([x0, y0, x1, y1], axis=1)
