"""Images by name: `open_data` decodes or streams them; `Augment` or `Stream` make batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .augment import Augment as Augment
    from .augment import EpochPlan as EpochPlan
    from .dataset import Dataset as Dataset
    from .dataset import Images as Images
    from .decode import memory_budget as memory_budget
    from .images import ImageSet as ImageSet
    from .images import balanced_subset as balanced_subset
    from .open import open_data as open_data
    from .open import prepare_data as prepare_data
    from .stream import Stream as Stream
    from .stream import StreamSet as StreamSet
    from .stream import default_workers as default_workers
    from .transforms import make_transform as make_transform
    from .transforms import val_resize as val_resize

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "augment": ["Augment", "EpochPlan"],
        "dataset": ["Dataset", "Images"],
        "decode": ["memory_budget"],
        "images": ["ImageSet", "balanced_subset"],
        "open": ["open_data", "prepare_data"],
        "stream": ["Stream", "StreamSet", "default_workers"],
        "transforms": ["make_transform", "val_resize"],
    },
)
