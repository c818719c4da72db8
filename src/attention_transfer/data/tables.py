"""`parquet:PATH` and `hub:OWNER/NAME`: images and labels as columns of Arrow tables.

Parquet has no random access: to read one image is to read its whole row group. Small sets are held
in memory, still encoded. Hugging Face's `datasets` copies larger ones once into an Arrow file in
its cache (HF_DATASETS_CACHE), which all processes map into memory and read in any order.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, first_line, nearest
from .decode import Encoded
from .labels import Labels, class_names
from .options import DataOptions
from .reader import Reader, file_size
from .source import Labelled, Source, source_in_files
from .spec import visible_files

# `test` is last, because its labels are often withheld.
VAL_SPLITS = ("validation", "val", "test")
IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "category")
EXPECTED = {"image": "images as {bytes, path} or bytes", "label": "whole numbers or words"}
# Several times CIFAR-10, which opens without a copy and without importing `datasets` (1 to 2 s).
IN_MEMORY_BYTES = 512 << 20


@dataclass(frozen=True)
class Columns:
    """The columns to read, whether labels are a "number" or a "word", and the names of classes."""

    image: str
    label: str
    label_kind: str
    classes: tuple[str, ...]


def open_parquet(
    path: Path, options: DataOptions, image: str | None = None, label: str | None = None
) -> Source:
    """Images and labels of train-*.parquet and validation-* or test-*.parquet.

    `image` and `label` name the columns. Raises `UserError` for missing files or columns, damaged
    files and labels out of range.
    """
    folder = parquet_folder(path)
    if folder is None:
        state = "holds no train-*.parquet"
        others = visible_files(path, "**/*.parquet")
        if others:
            state = f"holds {others[0].relative_to(path)} but no train-*.parquet"
        raise UserError(
            f"{path} {state}: expected Hugging Face's layout; rename the files, or check the path"
        )
    splits = {name: split_files(folder, name) for name in ("train", *VAL_SPLITS)}
    first = splits["train"][0]
    schema = _open_file(first).schema_arrow
    columns = find_columns(schema, str(first), f"parquet:{path}", image, label)
    return _open_splits(splits, lambda name: _read_parquet(splits[name], columns), columns, options)


def open_hub(
    place: str, options: DataOptions, image: str | None = None, label: str | None = None
) -> Source:
    """OWNER/NAME or OWNER/NAME:CONFIGURATION, which `datasets` downloads once into its cache.

    `image` and `label` name the columns. Raises `UserError` if there is no such data set, network
    or column, or a label is out of range.
    """
    name, _, configuration = place.partition(":")
    splits = _download(name, configuration or None)
    if not splits:
        raise UserError(f"hub:{place} has no splits: expected train; choose another")
    train = "train"
    if train not in splits:
        train = next(iter(splits))
    schema = splits[train].features.arrow_schema
    columns = find_columns(schema, f"hub:{place}", f"hub:{place}", image, label)

    def read(name: str) -> Labelled:
        table = splits[name].data
        files = [Path(f"hub:{place}") / name]
        labels = _as_labels([table.column(columns.label)], columns)
        return TableReader(table, columns.image, files, [table.num_rows]), labels

    return _open_splits(splits, read, columns, options, train)


def _open_splits(
    splits: Mapping[str, Collection[Any]],
    read: Callable[[str], Labelled],
    columns: Columns,
    options: DataOptions,
    train_name: str = "train",
) -> Source:
    train, val = read(train_name), None
    present = [name for name in VAL_SPLITS if splits.get(name) and name != train_name]
    if options.val_split is None and present:
        val = read(present[0])
    return source_in_files(train, val, columns.classes or class_names(train[1]), options)


def split_files(folder: Path, split: str) -> list[Path]:
    """Sorted parquet files of a split: SPLIT-*.parquet, SPLIT.parquet, or all in SPLIT/."""
    patterns = (f"{split}-*.parquet", f"{split}.parquet", f"{split}/*.parquet")
    return sorted({file for pattern in patterns for file in visible_files(folder, pattern)})


def parquet_folder(path: Path) -> Path | None:
    """`path`, or the folder directly below it (such as data/), that holds the training files."""
    for folder in (path, *sorted(entry for entry in path.iterdir() if entry.is_dir())):
        if split_files(folder, "train"):
            return folder
    return None


def find_columns(
    schema: Any, where: str, spec: str, image: str | None = None, label: str | None = None
) -> Columns:
    """The named columns, or else those that Hugging Face's metadata, types and names point to.

    Args:
        schema: a `pyarrow.Schema`.
        where, spec: the table, and the data spec to add #image=COLUMN to, for the errors.

    Raises:
        UserError: if there is no such column, or more than one.
    """
    features = _hugging_face_features(schema.metadata)
    feature_types = {name: features.get(name, {}).get("_type") for name in schema.names}
    kinds = {field.name: _kind(field.type) for field in schema}
    images = [name for name in kinds if feature_types[name] == "Image"]
    images = images or [name for name in kinds if kinds[name] == "image"]
    numbers = [name for name in kinds if kinds[name] == "number"]
    words = [name for name in kinds if kinds[name] == "word"]
    class_labels = [name for name in numbers if feature_types[name] == "ClassLabel"]
    all_columns = ", ".join(f"{field.name} ({field.type})" for field in schema)

    def choose(role: str, given: str | None, candidates: list[str], guess: str | None) -> str:
        name = given or guess
        if name in candidates:
            return str(name)
        if given is not None:
            problem, remedy = f"no {role} column {given!r}", f"check it{nearest(given, candidates)}"
        elif not candidates:
            problem, remedy = f"no {role} column", "check it"
        else:
            problem = f"several {role} columns ({', '.join(candidates)})"
            remedy = f"name one, {spec}#{role}={candidates[0]}"
        raise UserError(
            f"{where} has {problem} (its columns: {all_columns}): "
            f"expected {EXPECTED[role]}; {remedy}"
        )

    label_guess = (
        _single_or_usual(class_labels, LABEL_NAMES)
        or _single_or_usual([*numbers, *words], LABEL_NAMES)
        or _single_or_usual(numbers)
        or _single_or_usual(words)
    )
    image = choose("image", image, images, _single_or_usual(images, IMAGE_NAMES))
    label = choose("label", label, [*numbers, *words], label_guess)
    names = features.get(label, {}).get("names") or ()
    return Columns(image, label, kinds[label], tuple(str(name) for name in names))


def _single_or_usual(names: Sequence[str], usual: Sequence[str] = ()) -> str | None:
    if len(names) == 1:
        return names[0]
    return next((name for name in usual if name in names), None)


def _hugging_face_features(metadata: dict[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    """Features by column from the JSON in a schema's metadata, empty if there is none."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _kind(arrow_type: Any) -> str:
    """What a column can be: "image", "number" or "word"; "" for anything else."""
    from pyarrow import types

    if types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    if types.is_struct(arrow_type) and arrow_type.get_field_index("bytes") >= 0:
        arrow_type = arrow_type.field("bytes").type
    if types.is_binary(arrow_type) or types.is_large_binary(arrow_type):
        return "image"
    if types.is_integer(arrow_type) or types.is_boolean(arrow_type):
        return "number"
    if types.is_string(arrow_type) or types.is_large_string(arrow_type):
        return "word"
    return ""


def _open_file(file: Path) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot read {file} ({first_line(error)}): expected a whole parquet file; fetch it again"
    )


def _read_parquet(files: Sequence[Path], columns: Columns) -> Labelled:
    """The labels of all files, and a reader of their images."""
    import pyarrow

    in_memory = sum(file.stat().st_size for file in files) <= IN_MEMORY_BYTES
    names = [columns.label]
    if in_memory:
        names.append(columns.image)
    tables = []
    for file in files:
        parquet = _open_file(file)
        _check_columns(parquet.schema_arrow, columns, file)
        try:
            tables.append(parquet.read(columns=names))
        except (OSError, ValueError) as error:
            raise _damaged(file, error) from error
    counts = [table.num_rows for table in tables]
    if not sum(counts):
        raise UserError(f"{files[0]} has no rows: expected images and labels; check the file")
    labels = _as_labels([table.column(columns.label) for table in tables], columns)
    if in_memory:
        images = [table.select([columns.image]) for table in tables]
        # Permissive: a file whose images all lack a path has another type there.
        table = pyarrow.concat_tables(images, promote_options="permissive")
    else:
        table = _arrow_copy(files, columns.image)
    return TableReader(table, columns.image, files, counts), labels


def _check_columns(schema: Any, columns: Columns, file: Path) -> None:
    """Raises `UserError` unless a file has the columns of the first one, and labels of its kind."""
    kinds = {field.name: _kind(field.type) for field in schema}
    for name in (columns.label, columns.image):
        same = name == columns.image or kinds.get(name) == columns.label_kind
        if name not in kinds or not same:
            raise UserError(
                f"{file} has no such column {name!r} as train (its columns: {', '.join(kinds)}): "
                "expected the same; check it"
            )


def _as_labels(label_columns: Sequence[Any], columns: Columns) -> Labels:
    if columns.label_kind == "word":
        return [word for column in label_columns for word in column.cast("string").to_pylist()]
    # A missing label becomes -1, which Hugging Face writes for unlabelled images.
    numbers = [column.cast("int64").fill_null(-1).to_numpy() for column in label_columns]
    return np.concatenate(numbers)


def _arrow_copy(files: Sequence[Path], column: str) -> Any:
    """The image column of all files, memory-mapped from the copy in the cache of `datasets`."""
    import pyarrow

    datasets = _quiet_datasets()
    field = _open_file(files[0]).schema_arrow.field(column)
    # The plain type: as a feature `Image`, the library would look into it.
    features = datasets.Features.from_arrow_schema(pyarrow.schema([field]))
    try:
        builder = datasets.load_dataset_builder(
            "parquet",
            # The library takes paths as patterns, relative ones to a folder of its own choice.
            data_files=[glob.escape(str(file.resolve())) for file in files],
            columns=[column],
            features=features,
        )
        if not Path(builder.cache_dir).is_dir():
            print(
                f"copying the images of {files[0].parent} to {builder.cache_dir}", file=sys.stderr
            )
        builder.download_and_prepare()
        return builder.as_dataset(split="train").data
    except Exception as error:
        # The library raises a general error, whose cause names no file.
        for file in files:
            try:
                for _ in _open_file(file).iter_batches(columns=[column]):
                    pass
            except (OSError, ValueError) as reason:
                raise _damaged(file, reason) from reason
        raise UserError(
            f"cannot copy the images of {files[0].parent} to {datasets.config.HF_DATASETS_CACHE} "
            f"({first_line(error.__cause__ or error)}): expected a folder with room for them; "
            "name another with HF_DATASETS_CACHE"
        ) from error


def _quiet_datasets() -> Any:
    """The library `datasets`, without its progress bars and its log of every attempt."""
    import datasets
    from huggingface_hub.utils import disable_progress_bars

    datasets.disable_progress_bars()
    disable_progress_bars()
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    return datasets


def _download(name: str, configuration: str | None) -> dict[str, Any]:
    """The splits of a data set of the hub, by name."""
    datasets = _quiet_datasets()
    try:
        return dict(datasets.load_dataset(name, configuration))
    except Exception as error:
        # It raises errors of its own, of the network and of file formats.
        raise UserError(
            f"cannot fetch {name} from the Hugging Face hub ({first_line(error)}): expected "
            "OWNER/NAME of a data set of images; check the name and the network, or name your own "
            "files with parquet:PATH or folder:PATH"
        ) from error


class TableReader(Reader):
    """Images in a column of an Arrow table, whose rows come from `files`, `counts` rows each."""

    def __init__(
        self, table: Any, column: str, files: Sequence[Path], counts: Sequence[int]
    ) -> None:
        # One memory-mapped by `datasets` is pickled as the path of its file.
        self._table, self._column = table, column
        self._files = tuple(files)
        self._starts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def encoded(self, i: int) -> Encoded:
        # Read from the table: a `datasets.Dataset` takes twice as long to format a row.
        value = self._table.column(self._column)[i].as_py()
        if not isinstance(value, dict):
            return value
        if value.get("bytes") is None and value.get("path"):
            # Relative to the parquet file; the library has made the hub's paths absolute.
            return self._origin(i)[0].parent / value["path"]
        return value.get("bytes")

    def _origin(self, i: int) -> tuple[Path, int]:
        """The file of image `i` and its row there."""
        k = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._files[k], i - int(self._starts[k])

    def fingerprint_parts(self) -> Iterator[bytes]:
        yield self._column.encode()
        yield self._starts.tobytes()
        for file in self._files:
            yield os.fsencode(file.name)
            yield file_size(file)

    def file(self, i: int) -> str:
        file, row = self._origin(i)
        return f"{file.name}:{row}"

    def location(self, i: int) -> str:
        file, row = self._origin(i)
        return f"{file}, row {row}"
