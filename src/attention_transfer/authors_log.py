"""`log.txt` of the authors' scripts (szagoruyko/attention-transfer); imports no torch.

It has a line `json_stats: {...}` per epoch, each with all options of the script.
"""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

from .errors import UserError

MODEL_FILE, LOG_FILE = "model.pt7", "log.txt"
LOG_PREFIX = "json_stats:"
# Our export writes this option beside the authors': it describes classes and preprocessing.
EXTRA_KEY = "attention_transfer"


def is_authors_run(folder: str | Path) -> bool:
    """Whether the folder has the authors' `model.pt7`."""
    return (Path(folder) / MODEL_FILE).is_file()


def read_epochs(log: Path) -> list[dict[str, Any]]:
    """The options and statistics of each epoch, without lines that were cut short.

    Raises:
        UserError: for a file that is no text, or has no line of statistics.
    """
    try:
        lines = re.findall(rf"{LOG_PREFIX}(.*)", log.read_text())
    except UnicodeDecodeError as error:
        raise UserError(
            f"{log} is no text: expected the authors' log with lines {LOG_PREFIX} {{...}}"
        ) from error
    if not lines:
        raise UserError(f"{log} has no line {LOG_PREFIX} {{...}}: expected the authors' log")
    epochs = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a run that was killed has written half a line
            epoch = json.loads(line)
            if isinstance(epoch, dict):
                epochs.append(epoch)
    return epochs
