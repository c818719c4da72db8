"""`folder:PATH`: train/ and val/, or PATH itself, with a folder of image files a class."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .reader import FileReader
from .source import Source, Split
from .spec import distinct
from .stream import StreamSet

# torchvision.datasets.folder.IMG_EXTENSIONS
EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))
VAL_FOLDERS = ("val", "valid", "validation", "test")
BOX_COLUMNS = ("file", "x_min", "y_min", "x_max", "y_max")
NO_BOX = (0, 0, 0, 0)

Boxes = dict[str, tuple[int, int, int, int]]


def open_folder(path: Path, image_size: int | None, on_bad_image: str, want_val: bool) -> Source:
    """Lists the class folders of `path`; images of any size are resized by the shorter side and centre-cropped.

    Optional files: `classes.csv` (class folder, readable name) and `boxes.csv` (file, x_min, y_min, x_max, y_max in
    pixels of the upright image, both ends within the box). Raises `UserError` for missing, empty or unequal folders.
    """
    val_part = next((name for name in VAL_FOLDERS if (path / name).is_dir()), None)
    train_part = "train"
    if val_part is None and not (path / "train").is_dir() and _holds_classes(path):
        train_part = "."
    folders = class_folders(path, train_part)
    names = _class_names(path / "classes.csv")
    classes = distinct([names.get(folder, folder) for folder in folders], folders)
    boxes = read_boxes(path / "boxes.csv")

    def read(part: str, size: int | None) -> StreamSet:
        files, labels = list_files(path, part, folders)
        reader = FileReader(path, files)
        if boxes is not None:
            known = [boxes.get(reader.file(i), NO_BOX) for i in range(len(reader))]
            reader.boxes = np.array(known, dtype=np.int64).reshape(-1, 4)
        return StreamSet.whole(reader, labels, classes, size or reader.usual_size(), on_bad_image)

    train = read(train_part, image_size)
    if not want_val or val_part is None:
        return Source(classes, train.size, Split.read(train), None)
    _check_same_classes(path, folders, val_part)
    return Source(classes, train.size, Split.read(train), Split.read(read(val_part, train.size)))


def _holds_classes(path: Path) -> bool:
    """Whether folders directly in `path` hold images."""
    return any(
        _is_image(file) for folder in path.iterdir() if folder.is_dir() for file in folder.iterdir()
    )


def _is_image(file: Path) -> bool:
    """By its name; one that begins with a dot is the system's own, as macOS' ._cat.jpg beside cat.jpg."""
    return file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")


def class_folders(path: Path, part: str) -> list[str]:
    """Sorted names of the class folders in `path`/`part`."""
    folder = path / part
    if not folder.is_dir():
        raise UserError(
            f"{path} has no folder {part}/: expected train/ and val/ with a folder a class; add it, or check the path"
        )
    found = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    )
    if not found:
        state = "is empty" if not any(folder.iterdir()) else "has files but no folders"
        raise UserError(
            f"{folder} {state}: expected a folder of images a class; add them, or check the path"
        )
    return found


def list_files(path: Path, part: str, folders: list[str]) -> tuple[list[Path], Tensor]:
    """Sorted image files, nested ones too, and their labels int64 (N,)."""
    files: list[Path] = []
    counts = []
    for name in folders:
        here = path / part / name
        found = sorted(file for file in here.rglob("*") if _is_image(file) and file.is_file())
        if not found:
            kinds = ", ".join(sorted(EXTENSIONS))
            raise UserError(
                f"the class folder {here} has no images: expected files ending in {kinds}; add or remove it"
            )
        files += found
        counts.append(len(found))
    return files, torch.repeat_interleave(torch.arange(len(folders)), torch.tensor(counts))


def _check_same_classes(path: Path, folders: list[str], part: str) -> None:
    present = class_folders(path, part)
    for name in folders:
        if name not in present:
            raise UserError(
                f"{path / part} lacks the class folder {name!r} of train/: expected the same; add or remove it"
            )
    for name in present:
        if name not in folders:
            raise UserError(
                f"{path / part} has a class folder {name!r} that train/ lacks: expected the same; remove it"
            )


def _class_names(path: Path) -> dict[str, str]:
    """Readable names by class folder; a heading is a row like any other, as no folder has its name."""
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return {
                row[0].strip(): row[1].strip()
                for row in csv.reader(file)
                if len(row) >= 2 and row[1].strip()
            }
    except (UnicodeDecodeError, csv.Error) as error:
        raise _no_csv(path, error) from error


def _no_csv(path: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot read {path} ({error}): expected CSV in UTF-8; save it as such, or delete it"
    )


def read_boxes(path: Path) -> Boxes | None:
    """Half-open boxes by file name relative to the data's folder, or None where there is no such file."""
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return _boxes(path, csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise _no_csv(path, error) from error


def _boxes(path: Path, reader: csv.DictReader[str]) -> Boxes:
    boxes: Boxes = {}
    missing = [column for column in BOX_COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise UserError(
            f"{path} lacks the column {missing[0]!r}: expected {', '.join(BOX_COLUMNS)}; add it or delete the file"
        )
    for row in reader:
        try:
            x0, y0, x1, y1 = (int(row[column]) for column in BOX_COLUMNS[1:])
        except (TypeError, ValueError):
            raise UserError(
                f"{path}, line {reader.line_num}: expected a file and four whole numbers; correct or delete it"
            ) from None
        # In the file both ends belong to the box (a whole 64-pixel image is 0 to 63).
        boxes[row["file"].replace("\\", "/")] = (x0, y0, x1 + 1, y1 + 1)
    return boxes
