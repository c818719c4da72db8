"""`Dataset`: the training and validation images of a spec, resident or streamed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .fingerprint import DataRecord
from .images import Triple
from .source import Images as Images
from .stream import StreamSet

STATISTICS_IMAGES = 1024  # of streamed data, because the statistics of all would decode all
SHOWN_IMAGES = 32  # whose attention maps a run stores


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and validation images: two `ImageSet`s, or two `StreamSet`s."""

    spec: str
    train: Images
    val: Images
    # Per channel, over the training images (1,024 of them if streamed), in [0, 1] units.
    mean: Triple
    std: Triple
    record: DataRecord  # what identifies the source
    skipped: int = 0  # unreadable images that were left out
    notes: tuple[str, ...] = ()  # for the user
    # Indices of the validation images whose attention maps a run stores.
    shown: Tensor = field(default_factory=lambda: torch.arange(0))

    @property
    def streamed(self) -> bool:
        """Whether images are decoded again each time."""
        return isinstance(self.train, StreamSet)

    def unreadable_count(self) -> int:
        """Number of images left out so far. Streamed images count once they have been decoded."""
        return self.skipped + len(self.train.bad) + len(self.val.bad)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of all training images of the source, selected or not."""
        return self.record.fingerprint

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, by label."""
        return self.train.classes

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.train.image_size
