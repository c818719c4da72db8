"""Images by name: `open_data(spec)` decodes them once, `Augment` makes the batches of an epoch."""

from .augment import Augment, EpochPlan
from .images import Dataset, ImageSet, balanced_subset
from .open import open_data

__all__ = ["Augment", "Dataset", "EpochPlan", "ImageSet", "balanced_subset", "open_data"]
