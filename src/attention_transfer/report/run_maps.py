"""Draws the attention maps that a run stored as one picture for its loggers."""

from __future__ import annotations

from pathlib import Path

from ..run_folder import RunFolder
from .load_run import StoredMaps
from .map_figure import MapColumn, save_maps_figure
from .open_run import read_run

SHOWN = 8  # number of images


def save_run_maps(folder: RunFolder, out: Path) -> bool:
    """Writes the student's maps, and the teacher's next to them, of a few validation images.

    Returns:
        Whether there was anything to draw.
    """
    run = read_run(folder)
    if run.maps is None:
        return False
    columns = [_column("student", run.maps)]
    if run.teacher_maps is not None:
        columns.append(_column("teacher", run.teacher_maps))
    save_maps_figure(columns, run.maps.images[:SHOWN], out)
    return True


def _column(title: str, stored: StoredMaps) -> MapColumn:
    maps = {stage: m[:SHOWN] for stage, m in zip(stored.stages, stored.maps, strict=True)}
    return MapColumn(title, stored.predictions[:SHOWN], maps)
