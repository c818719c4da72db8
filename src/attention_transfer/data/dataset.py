"""`Dataset`: the training and validation images of a spec, resident or streamed."""

from __future__ import annotations

from dataclasses import dataclass

from .images import Triple
from .source import Images as Images
from .stream import StreamSet

STATISTICS_IMAGES = 1024


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and validation images: two `ImageSet`s, or two `StreamSet`s.

    Args:
        mean, std: by channel of the training images, in [0, 1] units; of streamed images, those of
            `STATISTICS_IMAGES` of them.
        skipped: number of unreadable images that were left out (`on_bad_image="skip"`).
        notes: for the user.
    """

    spec: str
    train: Images
    val: Images
    mean: Triple
    std: Triple
    skipped: int = 0
    notes: tuple[str, ...] = ()

    @property
    def streamed(self) -> bool:
        """Whether images are decoded anew each time."""
        return isinstance(self.train, StreamSet)

    def unreadable_count(self) -> int:
        """Number of images left out so far; of streamed images, those that were decoded."""
        return self.skipped + len(self.train.bad) + len(self.val.bad)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, by label."""
        return self.train.classes

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.train.image_size
