"""Images by name: `open_data` decodes them once or streams them; `Augment` or `Stream` make the batches."""

from .augment import Augment, EpochPlan
from .dataset import Dataset, Images
from .decode import memory_share
from .images import ImageSet, balanced_subset
from .open import open_data
from .stream import Stream, StreamSet, usual_workers
from .transforms import VAL_RESIZE, make_transform

__all__ = [
    "VAL_RESIZE",
    "Augment",
    "Dataset",
    "EpochPlan",
    "ImageSet",
    "Images",
    "Stream",
    "StreamSet",
    "balanced_subset",
    "make_transform",
    "memory_share",
    "open_data",
    "usual_workers",
]
