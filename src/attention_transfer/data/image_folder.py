"""`folder:PATH`: train/ and val/, or PATH itself, with a folder of image files for each class."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from ..errors import UserError
from .options import DataOptions
from .reader import FileReader
from .source import Labelled, Source, source_in_files
from .spec import VAL_NAMES, unique_names, visible_files

# torchvision.datasets.folder.IMG_EXTENSIONS
EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))
BOX_COLUMNS = ("file", "x_min", "y_min", "x_max", "y_max")
NO_BOX = (0, 0, 0, 0)

Boxes = dict[str, tuple[int, int, int, int]]


def open_folder(path: Path, options: DataOptions) -> Source:
    """Lists the class folders of `path`.

    Optional files: `classes.csv` (class folder, readable name) and `boxes.csv` (file, x_min, y_min,
    x_max, y_max in pixels of the upright image, both ends inside the box). Raises `UserError` for
    missing, empty or unequal folders and for malformed CSV files.
    """
    val_folders = [name for name in VAL_NAMES if (path / name).is_dir()]
    train_folder = "train"
    if not val_folders and not (path / "train").is_dir() and find_images(path, "*/*"):
        train_folder = "."
    folders = class_folders(path, train_folder)
    readable = _read_class_names(path / "classes.csv")
    classes = unique_names([readable.get(folder, folder) for folder in folders], folders)
    boxes = read_boxes(path / "boxes.csv")

    def read(split: str) -> Labelled:
        files, labels = list_files(path, split, folders)
        reader = FileReader(path, files)
        if boxes is not None:
            rows = [boxes.get(reader.file(i), NO_BOX) for i in range(len(reader))]
            reader.boxes = np.array(rows, dtype=np.int64).reshape(-1, 4)
        return reader, np.array(labels, dtype=np.int64)

    train, val = read(train_folder), None
    if options.val_split is None and val_folders:
        _check_same_classes(path, folders, val_folders[0])
        val = read(val_folders[0])
    return source_in_files(train, val, classes, options)


def find_images(folder: Path, pattern: str = "**/*") -> list[Path]:
    """Sorted image files below `folder`, by their extensions, without hidden files."""
    return [file for file in visible_files(folder, pattern) if file.suffix.lower() in EXTENSIONS]


def class_folders(path: Path, split: str) -> list[str]:
    """Sorted names of the class folders in `path`/`split`."""
    folder = path / split
    if not folder.is_dir():
        raise UserError(
            f"folder:{path} has no folder {split}/: expected train/ and val/ with a folder for "
            "each class; add it, or check the path"
        )
    entries = list(folder.iterdir())
    names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not names:
        state = "has files but no folders" if entries else "is empty"
        raise UserError(
            f"{folder} {state}: expected a folder of images for each class; add them, or check the "
            "path"
        )
    return names


def list_files(path: Path, split: str, folders: list[str]) -> tuple[list[Path], list[int]]:
    """Sorted image files by class, subfolders included, and their labels."""
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(folders):
        folder = path / split / name
        images = find_images(folder)
        if not images:
            raise UserError(
                f"the class folder {folder} has no images: expected files ending in "
                f"{', '.join(sorted(EXTENSIONS))}; add or remove it"
            )
        files += images
        labels += [label] * len(images)
    return files, labels


def _check_same_classes(path: Path, train: list[str], split: str) -> None:
    for name in sorted(set(train) ^ set(class_folders(path, split))):
        lacking, having = ("train", split)
        if name in train:
            lacking, having = (split, "train")
        raise UserError(
            f"{path / lacking} lacks the class folder {name!r} of {having}/: expected the same; "
            "add or remove it"
        )


def _read_class_names(path: Path) -> dict[str, str]:
    """Readable names by class folder. A header row is harmless: no folder has its name."""
    names: dict[str, str] = {}
    if not path.is_file():
        return names
    try:
        # -sig: Excel begins a file with a byte order mark.
        with path.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.reader(file):
                if len(row) >= 2 and row[1].strip():
                    names[row[0].strip()] = row[1].strip()
    except (UnicodeDecodeError, csv.Error) as error:
        raise _not_csv(path, error) from error
    return names


def _not_csv(path: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot read {path} ({error}): expected CSV in UTF-8; save it as such, or delete it"
    )


def read_boxes(path: Path) -> Boxes | None:
    """Half-open boxes by file name relative to the data folder; None if the file does not exist."""
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return _parse_boxes(path, csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise _not_csv(path, error) from error


def _parse_boxes(path: Path, reader: csv.DictReader[str]) -> Boxes:
    boxes: Boxes = {}
    missing = [column for column in BOX_COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise UserError(
            f"{path} lacks the column {missing[0]!r}: expected {', '.join(BOX_COLUMNS)}; "
            "add it or delete the file"
        )
    for row in reader:
        try:
            x0, y0, x1, y1 = (_pixel(row[column]) for column in BOX_COLUMNS[1:])
            # Backslashes come from Windows.
            file = row["file"].replace("\\", "/")
        except (TypeError, ValueError, AttributeError):
            raise UserError(
                f"{path}, line {reader.line_num}: expected a file and four whole numbers; "
                "correct or delete it"
            ) from None
        # In the file both ends are inside the box (a whole 64-pixel image is 0 to 63).
        boxes[file] = (x0, y0, x1 + 1, y1 + 1)
    return boxes


def _pixel(text: str) -> int:
    value = int(text)
    if abs(value) >= 1 << 31:
        raise ValueError(f"{value} is not a pixel position")
    return value
