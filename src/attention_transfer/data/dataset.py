"""What a spec names: training and validation images, resident or streamed."""

from __future__ import annotations

from dataclasses import dataclass

from .images import ImageSet, Triple
from .stream import StreamSet

Images = ImageSet | StreamSet
STATISTICS_IMAGES = 1024


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and validation images of one spec; `mean` and `std` are those of the training images, in [0, 1] units.

    Both are `ImageSet`s, or both `StreamSet`s (whose mean and std are those of `STATISTICS_IMAGES` of them). `skipped`
    counts the unreadable images that were left out (`on_bad_image="skip"`); `notes` say what a person should know.
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

    def unreadable(self) -> int:
        """How many images were left out so far; of streamed ones, those that were looked at."""
        return self.skipped + len(self.train.bad) + len(self.val.bad)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, by label."""
        return self.train.classes

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.train.image_size
