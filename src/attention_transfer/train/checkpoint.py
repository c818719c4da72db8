"""checkpoint.pt: written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..errors import RunError, first_line
from ..run_folder import replacing


def save_checkpoint(file: Path, state: dict[str, Any]) -> None:
    """Writes `state`, and replaces the last checkpoint only once the new one is on the disk.

    Raises:
        RunError: if it cannot be written; the last checkpoint is kept.
    """
    try:
        with replacing(file) as partial, open(partial, "wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())  # or a power cut could leave an empty file under the name
    except RunError:
        raise
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or first_line(error)
        raise RunError(
            f"cannot write {file}: {reason}; the last good one is kept: "
            "make room and run the command again"
        ) from error


def load_checkpoint(file: Path, device: torch.device) -> dict[str, Any]:
    """The state in `file`, its tensors on `device`.

    Raises:
        RunError: if the file is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:
        raise RunError(
            f"{file} cannot be read ({first_line(error)}): remove the run folder to start anew"
        ) from error
    return state
