"""Draws the plots of docs/findings.md from the runs in results/.

    python bench/findings.py

writes docs/pictures/localisation.png and few-labels.png.
"""

from __future__ import annotations

from pathlib import Path

from table_files import read_table_data

from attention_transfer.studies.plots import save_curves_figure, save_scatter_figure
from attention_transfer.studies.study_notes import MEASURES, runs_by_method
from attention_transfer.studies.summaries import Cell

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
PICTURES = ROOT / "docs" / "pictures"
METHODS = ("student alone", "AT", "KD", "AT+KD")
IN_DEFAULTS = ("student alone", "auto", "KD, α = 0.9, T = 4", "AT+KD, auto")
# By the percentage of CIFAR-10's labels: the file of runs, and what it calls the methods.
FEW_LABELS = {
    1.0: ("defaults/cifar-1%.jsonl", IN_DEFAULTS),
    10.0: ("defaults/cifar-10%.jsonl", IN_DEFAULTS),
    100.0: ("cifar10-short.jsonl", METHODS),
}


def draw_few_labels() -> None:
    curves: dict[str, dict[float, Cell]] = {}
    for share, (file, settings) in FEW_LABELS.items():
        table = read_table_data(RESULTS / file)
        for name, setting in zip(METHODS, settings, strict=True):
            cell = table.cell("", setting)
            assert cell is not None, f"{file} has the setting {setting}"
            curves.setdefault(name, {})[share] = cell
    save_curves_figure(curves, "labels, % of the training set", PICTURES / "few-labels.png")


def draw_localisation() -> None:
    runs = runs_by_method(read_table_data(RESULTS / "localisation.jsonl"))
    save_scatter_figure(runs, MEASURES, PICTURES / "localisation.png")


if __name__ == "__main__":
    draw_few_labels()
    draw_localisation()
