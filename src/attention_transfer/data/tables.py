"""`parquet:PATH` and `hub:OWNER/NAME`: images and labels as columns of Arrow tables.

Parquet has no random access: reading one image means reading its whole row group. Small data sets
are kept in memory, encoded. Hugging Face's `datasets` copies larger ones once into an Arrow file in
its cache (HF_DATASETS_CACHE), which all processes map into memory and read in any order.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, first_line
from ..run_folder import is_special
from .columns import EXPECTED, Columns, check_columns, check_guess, find_columns
from .decode import Encoded
from .labels import Labels, class_names
from .options import DataOptions
from .reader import Reader, file_size
from .source import Labelled, Source, source_in_files
from .spec import VAL_NAMES, visible_files

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
# Several times CIFAR-10, so that it opens without a copy and without importing `datasets`.
IN_MEMORY_BYTES = 512 << 20


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
        # Only a few levels deep: searching a home folder or the whole disk would take minutes.
        others = [*visible_files(path, "*.parquet"), *visible_files(path, "*/*.parquet")]
        if others:
            state = f"holds {others[0].relative_to(path)} but no train-*.parquet"
        raise UserError(
            f"parquet:{path} {state}: expected Hugging Face's layout; rename the files, or check "
            "the path"
        )
    splits = {name: split_files(folder, name) for name in ("train", *VAL_NAMES)}
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
    if not HUB_NAME.fullmatch(name):  # `datasets` would take a path for files of this machine
        raise UserError(
            f"hub:{place} is not the name of a data set: expected OWNER/NAME; for your own files "
            "write parquet:PATH or folder:PATH"
        )
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
        labels = _as_labels([table.column(columns.label)], columns, files)
        return TableReader(table, columns.image, files, [table.num_rows], contained=False), labels

    return _open_splits(splits, read, columns, options, train)


def _open_splits(
    splits: Mapping[str, Collection[Any]],
    read: Callable[[str], Labelled],
    columns: Columns,
    options: DataOptions,
    train_name: str = "train",
) -> Source:
    train, val = read(train_name), None
    check_guess(*train, columns)
    # A data set of the hub may have only a test split, which is then the training split.
    present = [name for name in VAL_NAMES if splits.get(name) and name != train_name]
    if options.val_split is None and present:
        val = read(present[0])
    return source_in_files(train, val, columns.classes or class_names(*train), options)


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
        check_columns(parquet.schema_arrow, columns, file)
        try:
            tables.append(parquet.read(columns=names))
        except (OSError, ValueError) as error:
            raise _damaged(file, error) from error
    counts = [table.num_rows for table in tables]
    if not sum(counts):
        raise UserError(f"{files[0]} has no rows: expected images and labels; check the file")
    labels = _as_labels([table.column(columns.label) for table in tables], columns, files)
    if in_memory:
        images = [table.select([columns.image]) for table in tables]
        try:
            # Permissive: if all images of a file lack a path, that column has another type.
            table = pyarrow.concat_tables(images, promote_options="permissive")
        except pyarrow.ArrowTypeError as error:
            raise UserError(
                f"the files of {files[0].parent} store images as different types "
                f"({first_line(error)}): expected one type in all files; rewrite the others"
            ) from error
    else:
        table = _arrow_copy(files, columns.image)
    return TableReader(table, columns.image, files, counts), labels


def _as_labels(label_columns: Sequence[Any], columns: Columns, files: Sequence[Path]) -> Labels:
    """The labels in the column of each file."""
    parts = []
    for column, file in zip(label_columns, files, strict=True):
        try:
            parts.append(_read_labels(column, columns.label_kind))
        except (OSError, ValueError) as error:  # a number outside int64, text that is not UTF-8
            raise UserError(
                f"{file}, column {columns.label!r}: cannot read the labels ({first_line(error)}): "
                f"expected {EXPECTED['label']}; correct them, or name another column"
            ) from error
    if columns.label_kind == "word":
        return [word for part in parts for word in part]
    return np.concatenate(parts)


def _read_labels(column: Any, kind: str) -> Any:
    if kind == "word":
        return column.cast("string").to_pylist()
    # A missing label becomes -1, which Hugging Face writes for unlabelled images.
    return column.cast("int64").fill_null(-1).to_numpy()


def _arrow_copy(files: Sequence[Path], column: str) -> Any:
    """The image column of all files, memory-mapped from the copy in the cache of `datasets`."""
    import pyarrow

    datasets = _quiet_datasets()
    field = _open_file(files[0]).schema_arrow.field(column)
    # The plain type: the library would decode a feature `Image`.
    features = datasets.Features.from_arrow_schema(pyarrow.schema([field]))
    try:
        builder = datasets.load_dataset_builder(
            "parquet",
            # The library takes paths as patterns, and relative ones from a folder of its choice.
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
        # The library raises a generic error, and its cause does not name the file.
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
        # It raises its own errors, network errors and errors of file formats.
        raise UserError(
            f"cannot fetch {name} from the Hugging Face hub ({first_line(error)}): expected "
            "OWNER/NAME of a data set of images; check the name and the network, or name your own "
            "files with parquet:PATH or folder:PATH"
        ) from error


class TableReader(Reader):
    """Images in a column of an Arrow table, whose rows come from `files`, `counts` rows each.

    A row may name an image file instead of holding an image. If `contained`, that file must lie in
    the folder of the row's own file or below it.
    """

    def __init__(
        self,
        table: Any,
        column: str,
        files: Sequence[Path],
        counts: Sequence[int],
        contained: bool = True,
    ) -> None:
        # A table memory-mapped by `datasets` is pickled as the path of its file.
        self._table, self._column = table, column
        self._files, self._contained = tuple(files), contained
        self._starts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def encoded(self, i: int) -> Encoded:
        # Read from the table: a `datasets.Dataset` takes longer to format a row.
        value = self._table.column(self._column)[i].as_py()
        path = None
        if isinstance(value, dict):
            path, value = value.get("path"), value.get("bytes")
        if isinstance(value, bytes):
            return value
        if value is None and path and isinstance(path, str):
            return self._linked(i, path)
        return None  # the metadata may declare any column as images

    def _linked(self, i: int, path: str) -> Path | None:
        """The image file that row `i` names, relative to the table's file."""
        file = self._origin(i)[0]
        if not self._contained:  # the library makes the paths of the hub absolute
            return file.parent / path
        linked = (file.parent / path).resolve()
        if not linked.is_relative_to(file.parent.resolve()) or is_special(linked):
            return None  # a table may name no file elsewhere on the machine, and no pipe
        return linked

    def _origin(self, i: int) -> tuple[Path, int]:
        """The file of image `i` and its row in that file."""
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
