"""Checks that an output file of a command replaces nothing that should be kept.

The check comes before the work. `run_folder.replacing` then writes the file atomically.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Annotated, Any

from .authors_log import LOG_FILE, MODEL_FILE, is_authors_run
from .errors import UserError
from .options import Bool, option
from .run_folder import RunFolder, is_special, write_json

JsonFile = Annotated[
    Path | None, option("Write the numbers to this JSON file.", default_text="none")
]
Force = Annotated[
    Bool, option("Also replace a file of a run, or a file of another kind.", default_text="refuse")
]

# The first bytes of a file of each kind. An ONNX model begins with the number of its format.
BEGINNINGS: dict[str, tuple[bytes, ...]] = {
    "html": (b"<!doctype html", b"<html"),
    "png": (b"\x89PNG\r\n\x1a\n",),
    "svg": (b"<?xml", b"<svg"),
    "pdf": (b"%PDF",),
    "onnx": (b"\x08",),
}
LONGEST_BEGINNING = 64


def check_json(
    file: Path | None, force: bool, inputs: Iterable[Path] = (), out: Path | None = None
) -> None:
    """Raises `UserError` if --json must not write `file`. Call it before the work.

    `out` is the folder of runs, or the store, that the command will write.
    """
    if file is not None:
        check_output("--json", file, "json", force, inputs, out)


def write_numbers(file: Path | None, numbers: Any) -> None:
    """Writes the file of --json, if it is given."""
    if file is not None:
        write_json(file, numbers)


def check_output(
    flag: str,
    path: Path,
    kind: str,
    force: bool,
    inputs: Iterable[Path] = (),
    out: Path | None = None,
) -> None:
    """Raises `UserError` if `path` must not be written: a folder, or a file that should be kept.

    These files are kept: a run's own files, files of another kind than the output, and `inputs`.
    With `force` only a folder is refused.

    Args:
        flag: the user's name for the output, such as --json.
        kind: a key of `BEGINNINGS`, json, pt2 or safetensors.
        inputs: files, and folders with all that is in them.
        out: a folder of runs, or a store, that the command will write.
    """
    output = f"{flag} {path}"
    if path.is_dir() or not path.name or (out is not None and path.resolve() == out.resolve()):
        raise UserError(f"{output} is a folder: name the file to write")
    if is_special(path):
        return
    target = path.resolve()
    for folder in target.parents:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{output}: {folder} is a file, not a folder")
    if force:
        return
    advice = "choose another file, or add --force to replace it"
    if _is_of_a_run(target, None if out is None else out.resolve()):
        raise UserError(f"{output} is the run's own: {advice}")
    if _is_of_a_store(target):
        raise UserError(f"{output} is in a store: {advice}")
    if not target.exists():
        return
    if {target, *target.parents} & {file.resolve() for file in inputs}:
        raise UserError(f"{output} is also read: {advice}")
    if not _begins_as(target, kind):
        raise UserError(f"{output} exists and is no {kind} file: {advice}")


def check_new_folder(flag: str, path: Path, why: str = "") -> None:
    """Raises `UserError` if a command cannot write a folder at `path`; an empty folder is allowed.

    `why` comes before the advice to name a new folder.
    """
    advice = f"{why}name a new folder"
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{flag} {path} is a folder that is not empty: {advice}")
    for parent in (path, *path.absolute().parents):
        if parent.exists() and not parent.is_dir():
            raise UserError(f"{flag} {path}: {parent} is a file: {advice}")


def _is_of_a_run(file: Path, out: Path | None) -> bool:
    """Whether training writes this file into a run folder: one that exists, or one of `out`."""
    for folder in file.parents:
        planned = out is not None and out in (folder, folder.parent)
        if not folder.is_dir() and not planned:
            continue
        run = RunFolder(folder)
        if not run.exists and not is_authors_run(folder) and not planned:
            continue
        own = [*run.files, folder / MODEL_FILE, folder / LOG_FILE]
        if file in own or folder / "logs" in file.parents:
            return True
    return False


def _is_of_a_store(file: Path) -> bool:
    header = file.parent / "store.json"
    return header.is_file() and (file == header or file.suffix == ".npy")


def _begins_as(file: Path, kind: str) -> bool:
    """Whether a file is empty, or of a kind by its first bytes or its structure."""
    with open(file, "rb") as stream:
        begins = stream.read(LONGEST_BEGINNING)
    if not begins:
        return True
    if kind == "json":
        return _is_json(file)
    if kind == "safetensors":
        return begins[8:9] == b"{"  # after the length of its header
    if kind == "pt2":
        return _is_exported(file)
    return begins.lstrip().lower().startswith(tuple(b.lower() for b in BEGINNINGS[kind]))


def _is_exported(file: Path) -> bool:
    """Whether a file is an exported program: a ZIP archive with an entry that says so."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # of a damaged archive
        return False
    return any(PurePath(name).name == "archive_format" for name in names)


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return False
    return True
