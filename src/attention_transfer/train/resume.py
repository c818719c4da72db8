"""Checks whether a run may be written to a folder, or continue in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.dataset import Dataset
from ..data.decode import UnreadableImageError
from ..errors import UserError
from ..methods.registry import method_names
from ..models.network import check_weights, run_fingerprint
from ..run_folder import RunFolder, write_json
from ..store.header import is_store, read_header
from .images import open_images

if TYPE_CHECKING:
    from ..config import Recipe


# The options that name other runs of `reproduce`.
MOVED_OPTIONS = ("teacher", "student_weights")
PATH_OPTIONS = ("model", "teacher", "teacher_weights", "student_weights", "data")
# The message for each fingerprint of a `DataRecord` that has changed.
FINGERPRINTS = {
    "fingerprint": "its training images or labels differ",
    "val_fingerprint": "its validation images or labels differ",
}


def check_folder(folder: RunFolder, recipe: Recipe) -> Recipe:
    """The recipe, with the order of methods of the run in the folder.

    The order of the methods affects the rounding of their sum.

    Raises:
        UserError: for a folder with other content, or a run of another recipe.
    """
    if not folder.exists:
        _check_new(folder)
        return recipe
    _check_written_by_run(folder, recipe)
    record = folder.environment()
    precision = (record.get("auto") or {}).get("precision")
    if precision is not None and recipe.precision not in ("auto", precision):
        raise UserError(
            f"{folder} holds a run in {precision}: leave --precision out, or choose another --out"
        )
    streamed = record.get("streamed")
    if streamed is not None and recipe.stream == ("off" if streamed else "on"):
        how = "streamed" if streamed else "resident"
        raise UserError(
            f"{folder} holds a run with {how} images: leave --stream out, or choose another --out"
        )
    _check_same(folder, recipe)
    return replace(recipe, method=folder.config().get("method", recipe.method))


def check_finished(folder: RunFolder, recipe: Recipe) -> None:
    """Checks that the finished run in `folder` is that of `recipe`, with its own weights.

    Its weights may have been deleted. Options of how it ran, such as --stream, may differ.

    Raises:
        UserError: for another recipe, teacher or weights than the run's.
    """
    if not folder.exists:
        raise UserError(f"{folder} has a summary.json and no config.yaml: remove the folder")
    _check_same(folder, recipe)
    # A summary.json that was copied from another run has the hash of other weights.
    if folder.student_file.is_file():
        check_weights(folder, run_fingerprint(folder.path))
    if recipe.teacher is not None:
        check_teacher(folder, teacher_fingerprint(recipe.teacher))


def _check_same(folder: RunFolder, recipe: Recipe) -> None:
    """Raises `UserError` if the run in `folder` has another recipe."""
    differences = _differences(recipe, folder.config(), folder.environment().get("teacher"))
    if differences:
        raise UserError(
            f"{folder} holds a different run ({'; '.join(differences[:4])}): "
            "choose another --out, or remove it"
        )


def _check_written_by_run(folder: RunFolder, recipe: Recipe) -> None:
    """Raises `UserError` for a config.yaml that a person wrote: the run would replace it."""
    # A run writes config.yaml first, with every option.
    others = (folder.environment_file, folder.checkpoint_file, folder.summary_file)
    alone = not any(file.is_file() for file in others)
    if alone and not recipe.to_dict().keys() <= folder.config().keys():
        raise UserError(
            f"--out {folder} has a config.yaml, but no run wrote it: choose a new folder"
        )


def _differences(recipe: Recipe, config: dict[str, Any], teacher: str | None) -> list[str]:
    """The options that change numbers and differ from those of a run folder.

    `teacher` is the fingerprint of its teacher, which may have been moved.
    """
    # Older runs lack newer options; the defaults of these are how the older runs were trained.
    existing = type(recipe)().to_dict() | config
    return [
        f"{key} is {existing.get(key)!r} in that run, {value!r} in this command"
        for key, value in recipe.identity().items()
        if not _same_value(key, existing.get(key), value)
        and not (key == "teacher" and value and _is_moved_teacher(value, teacher))
        and not (key in MOVED_OPTIONS and _is_moved_run(existing.get(key), value))
    ]


def _is_moved_run(recorded: Any, given: Any) -> bool:
    """Whether a run of `reproduce` is now at `given`; its last three folders say what it is."""
    if not isinstance(recorded, str) or not isinstance(given, str) or os.path.exists(recorded):
        return False
    return Path(recorded).parts[-3:] == Path(given).parts[-3:] and RunFolder(given).exists


def _is_moved_teacher(path: str, fingerprint: str | None) -> bool:
    """Whether the folder at `path` holds the teacher of this fingerprint."""
    return fingerprint is not None and teacher_fingerprint(path) == fingerprint


def _same_value(key: str, recorded: Any, given: Any) -> bool:
    """Whether two values mean the same: `./teacher` is `teacher`, `kd+at` is `at+kd`."""
    if recorded == given:
        return True
    if not isinstance(recorded, str) or not isinstance(given, str):
        return False
    if key == "method":
        return sorted(method_names(recorded)) == sorted(method_names(given))
    return key in PATH_OPTIONS and _resolved_path(key, recorded) == _resolved_path(key, given)


def _resolved_path(key: str, value: str) -> tuple[str, str]:
    """The resolved path of a value, and its other part: of folder:PATH or FILE.py:FACTORY."""
    path, rest = value, ""
    if key == "data":
        rest, _, path = value.partition(":")
    elif ".py:" in value:
        path, _, rest = value.rpartition(":")
    return os.path.realpath(path), rest


def _check_new(folder: RunFolder) -> None:
    for path in (folder.path, *folder.path.absolute().parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {folder}: {path} is a file; choose a new folder")
    # Hidden files do not count: a killed process leaves partial ones.
    if folder.path.is_dir() and any(path.name[0] != "." for path in folder.path.iterdir()):
        raise UserError(f"--out {folder} exists and holds no run of this tool: choose a new folder")


def open_run_images(recipe: Recipe, folder: RunFolder, jobs: int) -> Dataset:
    """The images of a run; a run that continues keeps them in memory or streams them as before.

    Raises:
        UserError: if the run in `folder` was started with other images.
    """
    streamed = folder.environment().get("streamed")
    data = open_images(recipe, recipe.augment, recipe, recipe.seed, streamed=streamed, jobs=jobs)
    _check_data(folder, data)
    return data


def _check_data(folder: RunFolder, data: Dataset) -> None:
    recorded = folder.environment().get("data")
    # Older runs have no record, and a run without a checkpoint starts anew.
    if recorded is None or not folder.has_checkpoint:
        return
    changes = []  # the most informative one first
    for key, value in asdict(data.record).items():
        before = recorded.get(key)
        if before == value or (key in FINGERPRINTS and before is None):
            continue
        changes.append(FINGERPRINTS.get(key) or f"it had {before} {key} and has {value} now")
    if changes:
        raise UserError(
            f"{data.spec} has changed since the run in {folder} began: {changes[0]}; "
            "put the data back as it was, or choose another --out"
        )


@contextmanager
def allow_changed_images(folder: RunFolder, writes: bool) -> Iterator[None]:
    """After an unreadable image in the block, lets the run continue once with repaired files.

    `writes` is true on the one process that writes to the folder.
    """
    try:
        yield
    except UnreadableImageError:
        record = folder.environment()
        if writes and "data" in record:
            record["data"] |= dict.fromkeys(FINGERPRINTS)
            write_json(folder.environment_file, record)
        raise


def check_teacher(folder: RunFolder, fingerprint: str | None) -> None:
    """Raises `UserError` if the run in `folder` had a teacher with other weights."""
    recorded = folder.environment().get("teacher")
    if None not in (fingerprint, recorded) and fingerprint != recorded:
        raise UserError(
            f"{folder} was trained with other weights of its teacher: choose another --out"
        )


def teacher_fingerprint(teacher: str) -> str | None:
    """The fingerprint of the weights of a run or of a store's teacher; None for a model name."""
    if is_store(teacher):
        return read_header(Path(teacher)).teacher.identity
    return run_fingerprint(teacher)


def describe_processes(folder: RunFolder, recipe: Recipe) -> str | None:
    """A warning if the run in `folder` was started on another number of processes."""
    config = folder.config()
    before = (config.get("devices") or 1) * (config.get("nodes") or 1)
    now = recipe.devices * recipe.nodes
    if not folder.has_checkpoint or before == now:
        return None
    return (
        f"the run was started on {before} processes and continues on {now}: its numbers agree "
        "within rounding, except for batch statistics, which each process computes on its share"
    )
