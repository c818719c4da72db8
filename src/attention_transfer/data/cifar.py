"""`cifar10` and `cifar100`: torchvision's files, Hugging Face's parquet, or a download into a cache folder."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .images import ImageSet
from .parquet import open_parquet, parquet_folder
from .source import Source, Split
from .spec import nearest_path

SIZE = 32
# The first file of torchvision's layout, by which a folder is known.
FIRST_FILE = {"cifar10": "data_batch_1", "cifar100": "train"}
BASE_FOLDER = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
LABEL = {"cifar10": None, "cifar100": "fine_label"}
CLASSES = {"cifar10": 10, "cifar100": 100}
# The values of the paper's own training code; those of CIFAR-100 are measured.
STATISTICS = {
    "cifar10": (
        (125.3 / 255, 123.0 / 255, 113.9 / 255),
        (63.0 / 255, 62.1 / 255, 66.7 / 255),
    )
}


def open_cifar(kind: str, path: Path | None, on_bad_image: str, want_val: bool) -> Source:
    """CIFAR-10 or CIFAR-100 (fine labels), 32x32; without `path` it is downloaded into a cache folder.

    Raises `UserError` where the folder holds neither layout or the download fails.
    """
    if path is None:
        return _open_torchvision(kind, *download(kind), want_val)
    if not path.is_dir():
        state = "is not a folder" if path.exists() else "does not exist"
        hint = nearest_path(path)
        raise UserError(
            f"data {kind}: {path} {state}; expected the folder that holds {kind}; check the path{hint}"
        )
    for folder in (path / BASE_FOLDER[kind], path):
        if (folder / FIRST_FILE[kind]).is_file():
            return _open_torchvision(kind, folder.parent, folder.name, want_val)
    if parquet_folder(path) is None:
        raise UserError(
            f"data {kind}: {path} holds neither {BASE_FOLDER[kind]}/ (torchvision's files) nor train-*.parquet "
            f"(Hugging Face's); put one there, or write {kind} alone to download it"
        )
    source = open_parquet(path, SIZE, on_bad_image, want_val, label=LABEL[kind])
    if len(source.classes) != CLASSES[kind]:
        raise UserError(
            f"data {kind}: {path} has {len(source.classes)} classes, expected {CLASSES[kind]}; "
            f"check the path, or write parquet:{path}"
        )
    return Source(source.classes, SIZE, source.train, source.val, STATISTICS.get(kind))


def cache_folder(kind: str) -> Path:
    """Where a download goes: attention-transfer/`kind` in XDG_CACHE_HOME or ~/.cache."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "attention-transfer"
        / kind
    )


def download(kind: str) -> tuple[Path, str]:
    """The cache folder and the folder in it, with the files there, fetched where they are not."""
    root = cache_folder(kind)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not (root / BASE_FOLDER[kind]).is_dir():
            print(f"downloading {kind} into {root}", file=sys.stderr)
        # torchvision draws a progress bar on standard error.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            _torchvision_class(kind, BASE_FOLDER[kind])(root=str(root), train=True, download=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot download {kind} into {root} ({reason}): expected {BASE_FOLDER[kind]}/ there; "
            f"check the network, or write {kind}:FOLDER for a copy that you have"
        ) from error
    return root, BASE_FOLDER[kind]


def _torchvision_class(kind: str, base_folder: str) -> Any:
    """torchvision's data set, looking into a folder of any name."""
    from torchvision import datasets

    original = datasets.CIFAR10 if kind == "cifar10" else datasets.CIFAR100
    return type(original.__name__, (original,), {"base_folder": base_folder})


def _open_torchvision(kind: str, root: Path, base_folder: str, want_val: bool) -> Source:
    cls = _torchvision_class(kind, base_folder)

    def split(train: bool) -> tuple[tuple[str, ...], Split]:
        try:
            opened = cls(root=str(root), train=train, download=False)
        except (OSError, RuntimeError, EOFError) as error:
            raise UserError(
                f"data {kind}: {root / base_folder} is incomplete or damaged: expected torchvision's files, unchanged; "
                "unpack them again"
            ) from error
        classes = tuple(opened.classes)
        labels = torch.tensor(opened.targets, dtype=torch.int64)
        return classes, Split.of(ImageSet(torch.from_numpy(opened.data), labels, classes))

    classes, train = split(True)
    return Source(classes, SIZE, train, split(False)[1] if want_val else None, STATISTICS.get(kind))
