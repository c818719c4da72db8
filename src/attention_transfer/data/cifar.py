"""`cifar10` and `cifar100`: torchvision's files, Hugging Face's parquet, or a download."""

from __future__ import annotations

import contextlib
import io
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ..cache import cache_folder
from ..errors import UserError, first_line
from ..image_statistics import CIFAR10
from .images import ImageSet
from .options import DataOptions
from .source import Source
from .spec import existing_folder
from .tables import open_parquet, parquet_folder

SIZE = 32
LOCK_FILE = ".download.lock"  # the processes of a run download in turn
# The first file of torchvision's layout, which identifies a folder.
FIRST_FILE = {"cifar10": "data_batch_1", "cifar100": "train"}
BASE_FOLDER = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
LABEL_COLUMN = {"cifar10": None, "cifar100": "fine_label"}
CLASSES = {"cifar10": 10, "cifar100": 100}
# Those of CIFAR-100 are computed when it is opened.
STATISTICS = {"cifar10": CIFAR10}


def open_cifar(kind: str, place: str, options: DataOptions) -> Source:
    """CIFAR-10 or CIFAR-100 (fine labels), 32x32, from a folder; `place` "" downloads them."""
    if not place:
        return _open_torchvision(kind, *download(kind), options)
    path = existing_folder(kind, place, f"the folder that holds {kind}")
    for folder in (path / BASE_FOLDER[kind], path):
        if (folder / FIRST_FILE[kind]).is_file():
            return _open_torchvision(kind, folder.parent, folder.name, options)
    if parquet_folder(path) is None:
        raise UserError(
            f"data {kind}: {path} holds neither {BASE_FOLDER[kind]}/ (torchvision's files) nor "
            "train-*.parquet (Hugging Face's); put one there, or write "
            f"{kind} alone to download it"
        )
    source = open_parquet(path, replace(options, image_size=SIZE), label=LABEL_COLUMN[kind])
    count = len(source.train.classes)
    if count != CLASSES[kind]:
        raise UserError(
            f"data {kind}: {path} has {count} classes, expected {CLASSES[kind]}; "
            f"check the path, or write parquet:{path}"
        )
    return replace(source, statistics=STATISTICS.get(kind))


def download(kind: str) -> tuple[Path, str]:
    """Downloads into the cache folder if needed; returns it and the name of its data folder."""
    root = cache_folder(kind)
    data_set = _torchvision_class(kind, BASE_FOLDER[kind])
    # The lock would need a folder that can be written.
    with contextlib.suppress(OSError, RuntimeError, EOFError):
        data_set(root=str(root), train=True)  # verifies its files
        return root, BASE_FOLDER[kind]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / LOCK_FILE):
            if not (root / BASE_FOLDER[kind]).is_dir():
                print(f"downloading {kind} into {root}", file=sys.stderr)
            # torchvision draws a progress bar on standard error, and verifies an existing download.
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                # The archive also contains the test images.
                data_set(root=str(root), train=True, download=True)
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        raise UserError(
            f"cannot download {kind} into {root} ({first_line(error)}): expected "
            f"{BASE_FOLDER[kind]}/ there; check the network, or write {kind}:FOLDER for your copy"
        ) from error
    return root, BASE_FOLDER[kind]


def _torchvision_class(kind: str, base_folder: str) -> Any:
    """torchvision's data set class, reading from `base_folder`."""
    from torchvision import datasets

    original = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
    # torchvision takes the folder only as an attribute of the class.
    return type(original.__name__, (original,), {"base_folder": base_folder})


def _open_torchvision(kind: str, root: Path, base_folder: str, options: DataOptions) -> Source:
    cls = _torchvision_class(kind, base_folder)

    def split(train: bool) -> ImageSet:
        try:
            opened = cls(root=str(root), train=train, download=False)
        except (OSError, RuntimeError, EOFError) as error:
            raise UserError(
                f"data {kind}: {root / base_folder} is incomplete or damaged: expected "
                "torchvision's files, unchanged; unpack them again"
            ) from error
        labels = torch.tensor(opened.targets, dtype=torch.int64)
        return ImageSet(torch.from_numpy(opened.data), labels, tuple(opened.classes))

    train, val = split(True), None
    if options.val_split is None:
        val = split(False)
    return Source(train, val, STATISTICS.get(kind))
