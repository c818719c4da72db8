"""`parquet:PATH`: images and labels in the parquet layout of Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError
from .decode import Encoded, decode_into, default_size
from .images import ImageSet
from .source import Source, Split, without_bad

# Where a data set has both, `test` often comes without labels.
VAL_NAMES = ("validation", "val", "test")
IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "fine_label")


@dataclass(frozen=True)
class Layout:
    """The columns to read; `classes` is empty where the files name none."""

    image: str
    label: str
    classes: tuple[str, ...]


def open_parquet(
    path: Path, image_size: int | None, on_bad_image: str, want_val: bool, label: str | None = None
) -> Source:
    """Reads labels at once and images when they are wanted, from train-*.parquet and validation-* or test-*.

    `label` names the label column; without it, it is found by type. Raises `UserError` for missing files or columns
    and for labels out of range.
    """
    folder = parquet_folder(path)
    if folder is None:
        raise UserError(f"{path} holds no train-*.parquet: expected Hugging Face's layout; check the path")
    train_files = part_files(folder, "train")
    layout = find_layout(train_files[0], label)
    train_labels = read_labels(train_files, layout, len(layout.classes) or None)
    classes = layout.classes or tuple(str(i) for i in range(int(train_labels.max()) + 1))
    size = image_size or default_size(_first_images(train_files, layout))

    def split(files: list[Path], labels: Tensor) -> Split:
        def load(indices: Tensor) -> tuple[ImageSet, int]:
            return _decode(files, layout, labels, indices, classes, size, on_bad_image)

        return Split(labels, load)

    train = split(train_files, train_labels)
    if not want_val:
        return Source(classes, size, train, None)
    val_files = next((found for name in VAL_NAMES if (found := part_files(folder, name))), None)
    if val_files is None:
        raise UserError(
            f"{folder} holds no validation-*.parquet, val-*.parquet or test-*.parquet: expected one beside train; "
            "add it, or cut it from train with val_split"
        )
    return Source(classes, size, train, split(val_files, read_labels(val_files, layout, len(classes))))


def part_files(folder: Path, part: str) -> list[Path]:
    """Sorted parquet files of one part."""
    return sorted({*folder.glob(f"{part}-*.parquet"), *folder.glob(f"{part}.parquet")})


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
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot read {file} ({reason}): expected a whole parquet file; fetch it again") from error


def find_layout(file: Path, label: str | None) -> Layout:
    """Finds the columns by Hugging Face's own metadata, then by type, then by usual names."""
    from pyarrow import types

    schema = _open_file(file).schema_arrow
    features = _features(schema.metadata)
    images = [field.name for field in schema if features.get(field.name, {}).get("_type") == "Image"] or [
        field.name for field in schema if _holds_bytes(field.type)
    ]
    numbers = [field.name for field in schema if types.is_integer(field.type)]
    classed = [name for name in numbers if features.get(name, {}).get("_type") == "ClassLabel"]
    columns = ", ".join(schema.names)
    if not images:
        raise UserError(
            f"{file} has no image column (its columns: {columns}): expected one of {{bytes, path}}; check the file"
        )
    if label is not None and label not in numbers:
        raise UserError(
            f"{file} has no label column {label!r} (its columns: {columns}): expected whole numbers; check it"
        )
    chosen = label or _prefer(classed or numbers, LABEL_NAMES)
    if chosen is None:
        found = "several columns of whole numbers" if numbers else "no label column"
        raise UserError(f"{file} has {found} (its columns: {columns}): expected one of whole numbers; name it label")
    names = features.get(chosen, {}).get("names")
    classes = tuple(str(name) for name in names) if isinstance(names, list) else ()
    return Layout(_prefer(images, IMAGE_NAMES) or images[0], chosen, classes)


def _prefer(found: list[str], usual: tuple[str, ...]) -> str | None:
    return found[0] if len(found) == 1 else next((name for name in usual if name in found), None)


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


def read_labels(files: list[Path], layout: Layout, classes: int | None) -> Tensor:
    """Labels int64 (N,) of all files; one below 0 or not below `classes` is an error that names its file and row."""
    from pyarrow import types

    parts = []
    for file in files:
        opened = _open_file(file)
        schema = opened.schema_arrow
        for column in (layout.label, layout.image):
            if column not in schema.names or (
                column == layout.label and not types.is_integer(schema.field(column).type)
            ):
                names = ", ".join(schema.names)
                raise UserError(
                    f"{file} has no such column {column!r} as train (its columns: {names}): expected the same; check it"
                )
        # A missing label counts as -1, which Hugging Face writes for unlabelled images.
        labels = opened.read(columns=[layout.label])[layout.label].cast("int64").fill_null(-1).to_numpy()
        wrong = np.flatnonzero((labels < 0) | (labels >= (classes if classes is not None else np.inf)))
        if len(wrong):
            limit = "0 or more" if classes is None else f"0 to {classes - 1}"
            raise UserError(
                f"{file}, row {wrong[0]}: the label {labels[wrong[0]]} is out of range, expected {limit}; "
                "correct it, or use a part that has labels"
            )
        parts.append(torch.tensor(labels))
    labels = torch.cat(parts)
    if not len(labels):
        raise UserError(f"{files[0]} has no rows: expected images and labels; check the file")
    return labels


def _encoded(table: Any, column: str) -> Iterator[Any]:
    """The binary values of an image column, not yet copied out of Arrow's memory."""
    from pyarrow import types

    for chunk in table[column].chunks:
        yield from (chunk.field("bytes") if types.is_struct(chunk.type) else chunk)


def _first_images(files: list[Path], layout: Layout) -> list[Encoded]:
    """The first images of the first file, enough to tell the usual size."""
    import pyarrow

    for batch in _open_file(files[0]).iter_batches(batch_size=256, columns=[layout.image]):
        return [value.as_py() for value in _encoded(pyarrow.Table.from_batches([batch]), layout.image)]
    return []


def _decode(
    files: list[Path],
    layout: Layout,
    labels: Tensor,
    indices: Tensor,
    classes: tuple[str, ...],
    size: int,
    on_bad_image: str,
) -> tuple[ImageSet, int]:
    """Decodes the rows at sorted `indices`; `files` of the set are "file:row"."""
    wanted = np.zeros(len(labels), dtype=bool)
    wanted[indices.numpy()] = True
    out = np.empty((len(indices), size, size, 3), dtype=np.uint8)
    sizes = np.empty((len(indices), 2), dtype=np.int64)
    names: list[str] = []
    for file, rows, encoded in _groups(files, layout.image, wanted):
        here = slice(len(names), len(names) + len(rows))
        where = [f"{file}, row {row}" for row in rows]
        sizes[here] = decode_into(out[here], encoded, where.__getitem__, on_bad_image)
        names += [f"{file.name}:{row}" for row in rows]
    return without_bad(ImageSet(torch.from_numpy(out), labels[indices], classes, None, tuple(names)), sizes)


def _groups(
    files: list[Path], column: str, wanted: NDArray[np.bool_]
) -> Iterator[tuple[Path, list[int], list[Encoded]]]:
    """File, rows in it and encoded images that are `wanted` (N,), a row group at a time to spare memory."""
    seen = 0
    for file in files:
        opened = _open_file(file)
        first_of_file = seen
        for group in range(opened.num_row_groups):
            count = opened.metadata.row_group(group).num_rows
            rows = np.flatnonzero(wanted[seen : seen + count])
            if len(rows):
                values = list(_encoded(opened.read_row_group(group, columns=[column]), column))
                yield file, (rows + (seen - first_of_file)).tolist(), [values[row].as_py() for row in rows]
            seen += count
