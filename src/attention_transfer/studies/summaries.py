"""Runs as JSON lines: one compact file for each table, without weights.

The first line describes the table: `title`, `metrics`, `columns`, `source`, `notes`. Each other
line belongs to a setting: a run, or numbers of the whole setting (`published` figures, `means` over
its runs).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..run_folder import RunFolder, replacing
from ..stats import Spread

Line = dict[str, Any]


@dataclass
class Cell:
    """A setting of a row: the lines of its finished runs, and the published figures.

    `means` are numbers of which only the mean over the runs is known.
    """

    row: str
    setting: str
    runs: list[Line] = field(default_factory=list)
    published: dict[str, float] = field(default_factory=dict)
    confirmed: bool = False
    means: dict[str, float] = field(default_factory=dict)
    planned: int = 0

    def values(self, key: str) -> dict[Any, float]:
        """A number of each run, by seed."""
        return {run["seed"]: run[key] for run in self.runs if run.get(key) is not None}

    def mean(self, key: str) -> float | None:
        """The mean of a number over the runs."""
        spread = self.spread(key)
        return self.means.get(key) if spread is None else spread.mean

    def spread(self, key: str) -> Spread | None:
        return Spread.of(self.values(key).values())


@dataclass
class TableData:
    """The description of a table, and its cells in order."""

    head: Line
    cells: list[Cell]

    @property
    def title(self) -> str:
        return str(self.head.get("title", ""))

    @property
    def metrics(self) -> list[str]:
        return list(self.head.get("metrics", ["error"]))

    def cell(self, row: str, setting: str) -> Cell | None:
        for cell in self.cells:
            if (cell.row, cell.setting) == (row, setting):
                return cell
        return None


# The numbers of a finished run that a table needs.
NEEDED = (
    *("seed", "model", "method", "data", "epochs", "parameters", "flops", "seconds"),
    *("val_accuracy", "val_loss", "train_loss"),
)


def summarize(folder: RunFolder) -> Line | None:
    """A finished run as a line, without paths of this machine; None for an unfinished run."""
    summary = folder.summary()
    if summary is None:
        return None
    config, environment = folder.config(), folder.environment()
    final = summary.get("final") or {}
    missing = [key for key in NEEDED if (summary | final).get(key) is None]
    if missing:
        raise UserError(f"{folder.summary_file} is damaged: it lacks {', '.join(missing)}")
    speed = summary.get("images_per_second")  # None for zoo:NAME
    line: Line = {
        "seed": summary["seed"],
        "model": summary["model"],
        "method": summary["method"],
        "data": str(summary["data"]).partition(":")[0],
        "epochs": summary["epochs"],
        "limit_train": config.get("limit_train"),
        "error": _error_percent(final["val_accuracy"]),
        "val_loss": round(final["val_loss"], 5),
        "train_loss": round(final["train_loss"], 5),
        "parameters": summary["parameters"],
        "flops": summary["flops"],
        "minutes": round(summary["seconds"] / 60, 2),
        "images_per_second": None if speed is None else round(speed, 1),
        "commit": environment.get("commit"),
        "precision": (environment.get("auto") or {}).get("precision"),
        "hardware": environment.get("hardware"),
        "torch": (environment.get("versions") or {}).get("torch"),
    }
    if final.get("val_top5") is not None:
        line["top5_error"] = _error_percent(final["val_top5"])
    teacher = summary.get("teacher") or {}
    if teacher.get("val_accuracy") is not None:
        line["teacher"] = teacher.get("model")
        line["teacher_error"] = _error_percent(teacher["val_accuracy"])
    attention = summary.get("attention") or {}
    if attention.get("box_area") is not None:
        line["box_area"] = round(100 * attention["box_area"], 2)
    for key in ("in_box", "pointing", "random_pointing"):
        share = (attention.get(key) or [None])[-1]  # of the last stage
        if share is not None:
            line[key] = round(100 * share, 2)
    return line


def _error_percent(accuracy: float) -> float:
    return round(100 * (1 - accuracy), 4)


# The first line of a table's JSON lines has a title and one of these keys.
TABLE_KEYS = {"metrics", "environment"}


def is_table_data(file: Path) -> bool:
    """Whether a file is the JSON lines of a table or of `study cost`."""
    if not file.is_file():
        return False
    try:
        with open(file, encoding="utf-8") as stream:
            head = json.loads(stream.readline())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(head, dict) and "title" in head and bool(head.keys() & TABLE_KEYS)


def write_table_data(file: Path, table: TableData) -> None:
    lines = [table.head]
    for cell in table.cells:
        place = {"row": cell.row, "setting": cell.setting}
        if cell.published:
            figures = {"published": cell.published, "confirmed": cell.confirmed}
            lines.append(place | figures)
        if cell.means:
            lines.append(place | {"means": cell.means})
        lines += [place | run for run in cell.runs]
    with replacing(file) as partial:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        partial.write_text(text, encoding="utf-8")


def merge_lines(runs: Iterable[Line | None]) -> list[Line]:
    """The lines of finished runs, by seed."""
    return sorted((run for run in runs if run is not None), key=lambda run: run["seed"])
