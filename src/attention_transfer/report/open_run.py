"""Opens a run for the report: ours, or one of the authors' scripts."""

from __future__ import annotations

from ..authors_log import is_authors_run
from ..run_folder import RunFolder
from .authors_run import read_authors_run
from .load_run import LoadedRun


def read_run(folder: RunFolder) -> LoadedRun:
    """Reads a run, finished or not; its maps are read when first used.

    Raises:
        UserError: if a file cannot be parsed.
    """
    if not folder.exists and is_authors_run(folder.path):
        return read_authors_run(folder.path)
    return LoadedRun(
        folder.path, folder.config(), folder.metrics(), folder.summary(), folder.environment()
    )
