"""Loads run folders; any file except config.yaml, and any key, may be missing."""

from __future__ import annotations

import math
import zipfile
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, first_line
from ..run_folder import RunFolder
from ..run_schema import MAPS, PREDICTIONS, ArraySchema, validated_arrays

if TYPE_CHECKING:
    import numpy as np

# Exceptions of numpy for a file that is not a complete npz.
UNREADABLE = (
    OSError, ValueError, EOFError, MemoryError, NotImplementedError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass
class StoredMaps:
    """Attention maps of K validation images, as the run stored them.

    images (K, H, W, 3) uint8; maps[s] (K, h_s, w_s), non-negative, one array per stage;
    boxes (K, 4) half-open x0, y0, x1, y1 in pixels of the image, all zero if unknown; labels and
    predictions are class names, empty if unknown.
    """

    images: np.ndarray
    labels: list[str]
    predictions: list[str]
    boxes: np.ndarray
    stages: list[str]
    maps: list[np.ndarray]

    @cached_property
    def index_of(self) -> dict[tuple[bytes, str], int]:
        """The index of each image by its pixels and label, which are the same in all runs."""
        pixels = [image.tobytes() for image in self.images]
        return {key: i for i, key in enumerate(zip(pixels, self.labels, strict=True))}


@dataclass
class StoredPredictions:
    """The classes of N validation images by number: true, the student's and the teacher's (N,)."""

    labels: np.ndarray
    answers: np.ndarray
    teacher: np.ndarray | None
    classes: list[str]

    def same_images(self, other: StoredPredictions) -> bool:
        """Whether both are of the same images, judged by their labels."""
        import numpy as np

        return self.classes == other.classes and np.array_equal(self.labels, other.labels)


@dataclass
class LoadedRun:
    """The files of one run folder; `summary` is None while the run is unfinished."""

    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    # From `apply.speed`: measured for a comparison, together with the other runs' networks.
    speed: dict[str, Any] | None = None

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def command(self) -> str:
        """`train` or `distill`."""
        return str(self.config.get("command") or "distill")

    @property
    def model(self) -> str:
        return str(self.config.get("model") or get_nested(self.summary, "model") or "?")

    @property
    def seed(self) -> Any:
        return self.config.get("seed", get_nested(self.summary, "seed"))

    def result(self, *keys: str) -> float | None:
        """A number of summary.json, or None."""
        return finite_number(get_nested(self.summary, *keys))

    @cached_property
    def maps(self) -> StoredMaps | None:
        """The attention maps, read when first used; None if the run stored none.

        Raises:
            UserError: if maps.npz cannot be read.
        """
        return _stored_maps(self._map_arrays, "")

    @cached_property
    def teacher_maps(self) -> StoredMaps | None:
        """The teacher's maps of the same images; None if the run stored none."""
        return _stored_maps(self._map_arrays, "teacher.")

    @cached_property
    def _map_arrays(self) -> dict[str, np.ndarray]:
        return _read_arrays(RunFolder(self.folder).maps_file, MAPS)

    @cached_property
    def predictions(self) -> StoredPredictions | None:
        """The predictions for all validation images; None if the run stored none.

        Raises:
            UserError: if predictions.npz cannot be read.
        """
        return _stored_predictions(RunFolder(self.folder).predictions_file)


def get_nested(tree: Any, *keys: str) -> Any:
    """`tree[key0][key1]…`, or None if a key is missing."""
    for key in keys:
        if not isinstance(tree, dict):
            return None
        tree = tree.get(key)
    return tree


def finite_number(value: Any) -> float | None:
    """`value` as a float, or None unless it is a finite number."""
    # bool is a subclass of int.
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _read_arrays(path: Path, schema: ArraySchema) -> dict[str, np.ndarray]:
    """The arrays of an npz file, checked; empty if there is no file."""
    import numpy as np

    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    validated_arrays(arrays, schema, path)
    return arrays


def _stored_maps(arrays: dict[str, np.ndarray], prefix: str) -> StoredMaps | None:
    """The maps whose names in the file start with `prefix`."""
    import numpy as np

    images = arrays.get("images")
    maps: list[np.ndarray] = []
    while f"{prefix}map.{len(maps)}" in arrays:
        maps.append(arrays[f"{prefix}map.{len(maps)}"])
    if images is None or not len(images) or not maps:
        return None
    count = len(images)
    stages = [str(stage) for stage in arrays.get(f"{prefix}stages", ())]
    if len(stages) != len(maps):
        stages = [f"stage {i + 1}" for i in range(len(maps))]
    classes = [str(name) for name in arrays.get("classes", ())]
    return StoredMaps(
        images=images,
        labels=_class_names(arrays.get("labels"), classes, count),
        predictions=_class_names(arrays.get(f"{prefix}predictions"), classes, count),
        boxes=arrays.get("boxes", np.zeros((count, 4), int)),
        stages=stages,
        maps=maps,
    )


def _stored_predictions(path: Path) -> StoredPredictions | None:
    arrays = _read_arrays(path, PREDICTIONS)
    if not {"labels", "student", "classes"} <= arrays.keys() or not len(arrays["labels"]):
        return None
    classes = [str(name) for name in arrays["classes"]]
    for name in ("labels", "student", "teacher"):
        values = arrays.get(name)
        if values is not None and (values.min() < 0 or values.max() >= len(classes)):
            raise UserError(
                f"{path} is damaged: {name} has values from {values.min()} to {values.max()}, "
                f"expected the numbers of {len(classes)} classes"
            )
    return StoredPredictions(arrays["labels"], arrays["student"], arrays.get("teacher"), classes)


def _class_names(indices: np.ndarray | None, classes: list[str], count: int) -> list[str]:
    """The class names for indices (K,); empty strings if there are no indices."""
    if indices is None:
        return [""] * count
    # A class without a name gets its number as the name.
    names = dict(enumerate(classes))
    return [names.get(index, str(index)) for index in indices.tolist()]
