"""`parquet:PATH`: images and labels in the parquet layout of Hugging Face."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError, nearest
from .decode import Encoded, default_size
from .labels import Labels, class_names, numbered
from .reader import Chosen, Reader
from .source import Source, Split
from .stream import StreamSet

# Where a data set has both, `test` often comes without labels.
VAL_NAMES = ("validation", "val", "test")
IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "category")
# A process keeps the row groups that it reads by turns; a window of them is as much as this.
WINDOW_BYTES = 256 << 20
HEADERS = 256


@dataclass(frozen=True)
class Layout:
    """The columns to read, and whether labels are words; `classes` is empty where the files name none."""

    image: str
    label: str
    classes: tuple[str, ...]
    words: bool


def open_parquet(
    path: Path,
    image_size: int | None,
    on_bad_image: str,
    want_val: bool,
    label: str | None = None,
    image: str | None = None,
) -> Source:
    """Reads labels at once and images when they are wanted, from train-*.parquet and validation-* or test-*.

    `image` and `label` name the columns; without them, they are found by type. Labels that are words become classes in
    alphabetical order. Raises `UserError` for missing files or columns and for labels out of range.
    """
    folder = parquet_folder(path)
    if folder is None:
        others = sorted(path.rglob("*.parquet"))
        state = (
            f"holds {others[0].relative_to(path)} but no train-*.parquet"
            if others
            else "holds no train-*.parquet"
        )
        raise UserError(
            f"{path} {state}: expected Hugging Face's layout; rename the files, or check the path"
        )
    train_files = part_files(folder, "train")
    layout = find_layout(train_files[0], label, image)
    found = read_labels(train_files, layout)
    classes = layout.classes or class_names(found)
    reader = ParquetReader(train_files, layout.image)
    labels = numbered(reader, found, classes)
    train = StreamSet.whole(
        reader, labels, classes, image_size or reader.usual_size(), on_bad_image
    )
    val_files = next((files for name in VAL_NAMES if (files := part_files(folder, name))), None)
    if not want_val or val_files is None:
        return Source(classes, train.size, Split.read(train), None)
    reader = ParquetReader(val_files, layout.image)
    labels = numbered(reader, read_labels(val_files, layout), classes)
    val = StreamSet.whole(reader, labels, classes, train.size, on_bad_image)
    return Source(classes, train.size, Split.read(train), Split.read(val))


def part_files(folder: Path, part: str) -> list[Path]:
    """Sorted parquet files of one part: train-*.parquet, train.parquet, or all in train/."""
    return sorted(
        {
            file
            for name in ("{}-*.parquet", "{}.parquet", "{}/*.parquet")
            for file in folder.glob(name.format(part))
        }
    )


def parquet_folder(path: Path) -> Path | None:
    """`path`, or the folder directly in it (such as data/), that holds the training files."""
    for folder in (path, *sorted(entry for entry in path.iterdir() if entry.is_dir())):
        if part_files(folder, "train"):
            return folder
    return None


def _open_file(file: Path) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(
        f"cannot read {file} ({reason}): expected a whole parquet file; fetch it again"
    )


def find_layout(file: Path, label: str | None, image: str | None = None) -> Layout:
    """The columns that are named, or else by Hugging Face's own metadata, then by usual names, then by type."""
    schema = _open_file(file).schema_arrow
    features = _features(schema.metadata)
    images = [
        field.name for field in schema if features.get(field.name, {}).get("_type") == "Image"
    ] or [field.name for field in schema if _holds_bytes(field.type)]
    numbers = [field.name for field in schema if _is_label(field.type, words=False)]
    words = [field.name for field in schema if _is_label(field.type, words=True)]
    classed = [name for name in numbers if features.get(name, {}).get("_type") == "ClassLabel"]
    columns = ", ".join(schema.names)
    if not images:
        raise UserError(
            f"{file} has no image column (its columns: {columns}): expected one of {{bytes, path}}; check the file"
        )
    if image is not None and image not in images:
        expected = f"one of {', '.join(images)}{nearest(image, images)}"
        raise UserError(
            f"{file} has no image column {image!r} (its columns: {columns}): expected {expected}"
        )
    if image is None and len(images) > 1 and not any(name in images for name in IMAGE_NAMES):
        raise UserError(
            f"{file} has several image columns ({', '.join(images)}): expected one, or one called image; "
            f"say which, parquet:PATH#image={images[0]}"
        )
    if label is not None and label not in (*numbers, *words):
        raise UserError(
            f"{file} has no label column {label!r} (its columns: {columns}): expected whole numbers or words; check it"
            f"{nearest(label, [*numbers, *words])}"
        )
    chosen = (
        label
        or _prefer(classed, LABEL_NAMES)
        or _named([*numbers, *words])
        or _only(numbers)
        or _only(words)
    )
    if chosen is None:
        kinds = "whole numbers" if numbers else "words"
        found = f"several columns of {kinds}" if numbers or words else "no label column"
        what = (
            f"say which, parquet:PATH#label={(numbers or words)[0]}"
            if numbers or words
            else "add one"
        )
        raise UserError(
            f"{file} has {found} (its columns: {columns}): expected one of whole numbers or words; {what}"
        )
    names = features.get(chosen, {}).get("names")
    classes = tuple(str(name) for name in names) if isinstance(names, list) else ()
    return Layout(
        image or _prefer(images, IMAGE_NAMES) or images[0], chosen, classes, chosen in words
    )


def _prefer(found: list[str], usual: tuple[str, ...]) -> str | None:
    return _only(found) or next((name for name in usual if name in found), None)


def _named(found: list[str]) -> str | None:
    return next((name for name in LABEL_NAMES if name in found), None)


def _only(found: list[str]) -> str | None:
    return found[0] if len(found) == 1 else None


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_label(kind: Any, words: bool) -> bool:
    from pyarrow import types

    if not words:
        return bool(types.is_integer(kind) or types.is_boolean(kind))
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind))


def read_labels(files: list[Path], layout: Layout) -> Labels:
    """The label column of all files."""
    parts: list[Any] = []
    for file in files:
        opened = _open_file(file)
        schema = opened.schema_arrow
        for column in (layout.label, layout.image):
            kind = schema.field(column).type if column in schema.names else None
            if kind is None or (column == layout.label and not _is_label(kind, layout.words)):
                names = ", ".join(schema.names)
                raise UserError(
                    f"{file} has no such column {column!r} as train (its columns: {names}): expected the same; check it"
                )
        try:
            labels = opened.read(columns=[layout.label])[layout.label]
        except (OSError, ValueError) as error:
            raise _damaged(file, error) from error
        # A missing label counts as -1, which Hugging Face writes for unlabelled images.
        if layout.words:
            parts.append(labels.cast("string").to_pylist())
        else:
            parts.append(labels.cast("int64").fill_null(-1).to_numpy())
    if not sum(map(len, parts)):
        raise UserError(f"{files[0]} has no rows: expected images and labels; check the file")
    return [word for part in parts for word in part] if layout.words else np.concatenate(parts)


class ParquetReader(Reader):
    """Rows of parquet files; a row group is read as a whole, and the last ones are kept."""

    def __init__(self, files: Sequence[Path], column: str) -> None:
        self.files, self.column = tuple(files), column
        groups, sizes = [], []
        for number, file in enumerate(self.files):
            metadata = _open_file(file).metadata
            for group in range(metadata.num_row_groups):
                about = metadata.row_group(group)
                groups.append((number, group, about.num_rows))
                sizes.append(about.total_byte_size)
        self._groups = groups
        counts = torch.tensor([count for _, _, count in groups])
        self._starts = np.cumsum([0, *counts.tolist()])
        self._first_of_file: dict[int, int] = {}
        for (number, _, _), start in zip(groups, self._starts.tolist(), strict=False):
            self._first_of_file.setdefault(number, start)
        self.blocks = torch.repeat_interleave(torch.arange(len(groups)), counts)
        self.window = max(1, WINDOW_BYTES // max(1, max(sizes, default=1)))
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._open: dict[int, Any] = {}
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {
            k: v
            for k, v in self.__dict__.items()
            if k not in ("_lock", "_kept", "_open", "_process")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _row(self, i: int) -> tuple[int, int, int]:
        """Row group, row in it, row in its file."""
        group = int(np.searchsorted(self._starts, i, side="right")) - 1
        return group, i - int(self._starts[group]), i - self._first_of_file[self._groups[group][0]]

    def encoded(self, i: int) -> Encoded:
        group, row, _ = self._row(i)
        if self._process != os.getpid():
            self._begin()  # an open file is not shared with the process that this one was forked from
        with self._lock:
            values = self._values(group)
        value = values[row].as_py()
        if not isinstance(value, dict):
            return value
        if value.get("bytes") is None and value.get("path"):
            file = self.files[self._groups[group][0]].parent / value["path"]
            return file if file.is_file() else None
        return value.get("bytes")

    def _values(self, group: int) -> Any:
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        file, number, _ = self._groups[group]
        if file not in self._open:
            self._open[file] = _open_file(self.files[file])
        # No threads of Arrow's: this may be a forked process.
        table = self._open[file].read_row_group(number, columns=[self.column], use_threads=False)
        self._kept[group] = table[self.column]
        while len(self._kept) > self.window:
            self._kept.popitem(last=False)
        return self._kept[group]

    def usual_size(self) -> int:
        # Images all over the set would mean to read all of it.
        return default_size(Chosen(self, range(min(len(self), HEADERS))))

    def file(self, i: int) -> str:
        group, _, row = self._row(i)
        return f"{self.files[self._groups[group][0]].name}:{row}"

    def place(self, i: int) -> str:
        group, _, row = self._row(i)
        return f"{self.files[self._groups[group][0]]}, row {row}"
