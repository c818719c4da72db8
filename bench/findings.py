"""The measurements and plots that are only in docs/findings.md.

    python bench/findings.py localisation MATRIX DATA [--lengths RUN...]
    python bench/findings.py draw

`localisation`: MATRIX is the folder of `bench/defaults.py`, whose settings on photographs are read;
DATA are their images (folder:…). `--lengths` are networks alone, trained for several lengths. The
attention of every network is measured again in the boxes of the same 500 images, in float32, and
written to results/localisation/.

`draw` writes docs/pictures/localisation.png and few-labels.png, and prints rank correlations.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from defaults import VARIANTS, folder_of
from table_files import read_table_data

from attention_transfer.apply.evaluate import run_and_data
from attention_transfer.apply.inference import InferenceModel
from attention_transfer.apply.maps import attention_in_box, layer_names
from attention_transfer.data.open import open_data
from attention_transfer.run_folder import RunFolder
from attention_transfer.stats import rank_correlation
from attention_transfer.studies.plots import save_curves_figure, save_scatter_figure
from attention_transfer.studies.study_notes import MEASURES, estimate_text
from attention_transfer.studies.summaries import Cell, Line, TableData, summarize, write_table_data

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "localisation"
PICTURES = ROOT / "docs" / "pictures"
TITLES = {
    "photos-resnet10": "ResNet-10-T",
    "photos-mobilenet": "MobileNetV3-small",
    "photos-pvt": "PVTv2-B0",
}
TEACHER = "photos-resnet18"
COLUMNS = ["seeds", "mean", "in box", "pointing"]


def measure(folder: Path, data: str) -> Line | None:
    """The line of a finished run, with the last stage's attention in the boxes."""
    line = summarize(RunFolder(folder))
    if line is None:
        return None
    network, options = run_and_data(str(folder), data, None, None, trust_code=False)
    images = open_data(**options).val
    model = InferenceModel(network.module, network.preprocess, "fp32").eval()
    found = attention_in_box(model, layer_names(model, images), images)
    assert found is not None, "the images have boxes"
    for key in MEASURES:
        line[key] = round(100 * found[key][-1], 2)
        line[f"{key}_by_stage"] = [round(100 * share, 2) for share in found[key]]
    line["box_area"] = round(100 * found["box_area"], 2)
    print(folder, line["error"], line["in_box"], line["pointing"], flush=True)
    return line


def cell_of(name: str, folders: Iterable[Path], data: str) -> Cell:
    lines = (measure(folder, data) for folder in folders)
    return Cell("", name, [line for line in lines if line is not None])


def measure_all(matrix: Path, data: str, lengths: list[Path]) -> None:
    RESULTS.mkdir(exist_ok=True)
    for setting, title in TITLES.items():
        cells = []
        for variant in VARIANTS:
            folders = sorted(folder_of(matrix, setting, variant).glob("seed-*"))
            cells.append(cell_of(variant, folders, data))
        write(setting, title, cells)
    teacher = cell_of("teacher", [matrix / "teachers" / TEACHER], data)
    others = [
        cell_of(f"alone, {RunFolder(run).config()['epochs']} epochs", [run], data)
        for run in lengths
    ]
    write("lengths", "alone, on all images", [teacher, *others])


def write(name: str, title: str, cells: list[Cell]) -> None:
    kept = [cell for cell in cells if cell.runs]
    write_table_data(
        RESULTS / f"{name}.jsonl", TableData({"title": title, "columns": COLUMNS}, kept)
    )


def group(setting: str) -> str:
    """The method of a variant."""
    if setting.startswith(("student alone", "alone", "teacher")):
        return "alone"
    if setting.startswith("AT+KD"):
        return "AT+KD"
    return "KD" if setting.startswith("KD") else "AT"


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
        table = read_table_data(ROOT / "results" / file)
        for name, setting in zip(METHODS, settings, strict=True):
            cell = table.cell("", setting)
            assert cell is not None, f"{file} has the setting {setting}"
            curves.setdefault(name, {})[share] = cell
    save_curves_figure(curves, "labels, % of the training set", PICTURES / "few-labels.png")


def draw_localisation() -> None:
    runs: dict[str, list[Line]] = {"alone": [], "KD": [], "AT": [], "AT+KD": []}
    by_network: dict[str, list[Line]] = {}
    for page in sorted(RESULTS.glob("*.jsonl")):
        table = read_table_data(page)
        for cell in table.cells:
            runs[group(cell.setting)] += cell.runs
            by_network.setdefault(f"{table.title}, all methods", []).extend(cell.runs)
    save_scatter_figure(runs, MEASURES, PICTURES / "localisation.png")
    every_run = [run for lines in runs.values() for run in lines]
    without = [run for name in ("alone", "KD") for run in runs[name]]
    groups: dict[str, list[Line]] = {"all": every_run, "alone and KD": without}
    groups |= {"AT and AT+KD": runs["AT"] + runs["AT+KD"], **by_network}
    for key, label in MEASURES.items():
        for name, lines in groups.items():
            print(f"{label}; {name}: {correlation(lines, key)}")


def correlation(runs: list[Line], key: str) -> str:
    estimate = rank_correlation([100 - run["error"] for run in runs], [run[key] for run in runs])
    if estimate is None:
        return f"n = {len(runs)}"
    return estimate_text(estimate)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("what", choices=("localisation", "draw"))
    parser.add_argument("matrix", type=Path, nargs="?")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--lengths", nargs="*", type=Path, default=[])
    given = parser.parse_args()
    if given.what == "draw":
        draw_few_labels()
        draw_localisation()
    elif given.data is None:
        parser.error("localisation needs MATRIX, the folder of bench/defaults.py, and DATA")
    else:
        measure_all(given.matrix, given.data, given.lengths)


if __name__ == "__main__":
    main()
