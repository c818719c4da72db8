"""What a run folder holds, read with tolerance: any key of any file may be missing."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..run_folder import RunFolder

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Maps:
    """The attention maps of K validation images.

    images (K, H, W, 3) uint8; maps[s] (K, h_s, w_s) non-negative, one entry a stage; boxes (K, 4) as half-open
    x0, y0, x1, y1 in pixels of the image, all zero where unknown; labels and predictions are class names.
    """

    images: np.ndarray
    labels: list[str]
    predictions: list[str]
    boxes: np.ndarray
    stages: list[str]
    maps: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.images)

    def right(self, index: int) -> bool:
        return self.labels[index] == self.predictions[index]


@dataclass
class Run:
    """One run folder. `summary` is None while the run is unfinished; `maps` are read when first asked for."""

    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] | None = None
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def command(self) -> str:
        default = "distill" if self.config.get("teacher") or self.config.get("method") else "train"
        return str(self.config.get("command") or default)

    @property
    def model(self) -> str:
        return str(
            self.config.get("model")
            or self.config.get("student")
            or dig(self.summary, "model")
            or "?"
        )

    @property
    def seed(self) -> Any:
        return self.config.get("seed", dig(self.summary, "seed"))

    def final(self, name: str) -> float | None:
        """A number of summary.json's `final`, or None."""
        return number(dig(self.summary, "final", name))

    @cached_property
    def maps(self) -> Maps | None:
        """The run's attention maps, or None where it left none.

        Raises:
            UserError: where maps.npz cannot be read.
        """
        path = RunFolder(self.folder).maps_file
        return _read_maps(path) if path.is_file() else None


def dig(tree: Any, *keys: str) -> Any:
    """`tree[k0][k1]…`, or None where any step is missing."""
    for key in keys:
        if not isinstance(tree, dict):
            return None
        tree = tree.get(key)
    return tree


def number(value: Any) -> float | None:
    """`value` as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def read_run(folder: RunFolder) -> Run:
    """Reads what there is of a run, finished or not; the maps are left for later.

    Raises:
        UserError: for a file that is not what its name says.
    """
    import yaml

    parts: dict[str, Any] = {}
    for name, read, path in (
        ("config", folder.config, folder.config_file),
        ("metrics", folder.metrics, folder.metrics_file),
        ("summary", folder.summary, folder.summary_file),
        ("environment", folder.environment, folder.environment_file),
    ):
        try:
            parts[name] = read()
        except (
            json.JSONDecodeError,
            yaml.YAMLError,
            UnicodeDecodeError,
            TypeError,
            ValueError,
        ) as error:
            raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    return Run(
        folder=folder.path,
        config={str(k): v for k, v in parts["config"].items()},
        metrics=[row for row in parts["metrics"] if isinstance(row, dict)],
        summary=parts["summary"] if isinstance(parts["summary"], dict) else None,
        environment=parts["environment"] if isinstance(parts["environment"], dict) else {},
    )


def _read_maps(path: Path) -> Maps | None:
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    images = arrays.get("images")
    maps: list[np.ndarray] = []
    while f"map.{len(maps)}" in arrays:
        maps.append(arrays[f"map.{len(maps)}"].astype(np.float32))
    if images is None or images.ndim != 4 or not len(images) or not maps:
        return None
    count = len(images)
    if any(m.ndim != 3 or len(m) != count for m in maps):
        raise UserError(f"{path} cannot be read: its maps do not belong to its {count} images")
    classes = [str(c) for c in arrays.get("classes", [])]
    stages = [str(s) for s in arrays.get("stages", [])]
    return Maps(
        images=images,
        labels=_names(arrays.get("labels"), classes, count),
        predictions=_names(arrays.get("predictions"), classes, count),
        boxes=arrays.get("boxes", np.zeros((count, 4), int)),
        stages=[stages[i] if i < len(stages) else f"stage {i + 1}" for i in range(len(maps))],
        maps=maps,
    )


def _names(indices: Any, classes: list[str], count: int) -> list[str]:
    """Class names for indices (K,); an empty string where there is none."""
    if indices is None:
        return [""] * count
    return [classes[int(i)] if 0 <= int(i) < len(classes) else str(int(i)) for i in indices]
