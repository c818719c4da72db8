"""checkpoint.pt and the previous checkpoint: written atomically, and read with their checksums.

torch.save writes a zip archive with a CRC-32 of each tensor. torch.load does not check it, so
`_read` does.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import RunError, first_line
from ..run_folder import RunFolder, replacing


def save_checkpoint(folder: RunFolder, state: dict[str, Any]) -> None:
    """Writes `state` as checkpoint.pt; the last checkpoint becomes the previous one.

    Raises:
        RunError: if it cannot be written; the last checkpoint is kept.
    """
    file = folder.checkpoint_file
    try:
        with replacing(file) as partial:
            with open(partial, "wb") as stream:
                torch.save(state, stream)
                stream.flush()
                os.fsync(stream.fileno())  # otherwise a power cut could leave an empty file
            # If the process is killed between the two renames, only the previous checkpoint is
            # left, and `load_checkpoint` reads it. A link is not moved: `replacing` replaces the
            # file that it points to.
            if file.is_file() and not file.is_symlink():
                os.replace(file, folder.previous_checkpoint_file)
    except RunError:
        raise
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or first_line(error)
        raise RunError(
            f"cannot write {file}: {reason}; the last good one is kept: "
            "make room and run the command again"
        ) from error


def load_checkpoint(
    folder: RunFolder,
    device: torch.device,
    load: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
) -> Path:
    """Calls `load` with the state in checkpoint.pt, its tensors on `device`; returns the file.

    If checkpoint.pt is damaged or missing, the previous checkpoint is read. `say` prints a warning
    about a damaged file.

    Raises:
        RunError: if neither can be read, or the state is not of this run.
    """
    problems = []
    for file in (folder.checkpoint_file, folder.previous_checkpoint_file):
        if not file.is_file():
            continue
        try:
            state = _read(file, device)
        except _DamageError as damage:
            problems.append(f"{file} cannot be read ({damage})")
            continue
        if problems:
            say(f"warning: {problems[0]}: continuing from the checkpoint before it")
        try:
            load(state)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise RunError(
                f"{file} does not fit this run ({first_line(error)}): "
                "restore the run's own file, or remove the run folder to start anew"
            ) from error
        return file
    raise RunError(f"{'; '.join(problems)}: remove the run folder to start anew")


class _DamageError(Exception):
    """A file is not the checkpoint that was written; the message says why."""


def _read(file: Path, device: torch.device) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except OSError as error:
        raise _DamageError(error.strerror or first_line(error)) from error
    except Exception as error:  # zipfile raises several kinds
        raise _DamageError("it is damaged") from error
    if damaged is not None:
        raise _DamageError(f"the checksum of its part {damaged} is wrong")
    try:
        state = torch.load(file, map_location=device, weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # torch's message is not shown: it advises to load the file with its pickled code.
        raise _DamageError("it is no checkpoint of a run") from error
    if not isinstance(state, dict):
        raise _DamageError("it is no checkpoint of a run")
    return state
