"""The runs behind the default weights: settings × (alone, sweeps of β, candidates) × seeds.

    python bench/defaults.py run DATA --settings digits --variants auto --seeds 3
    python bench/defaults.py collect                    writes results/defaults/SETTING.jsonl

DATA holds the folders `cifar10` and `tiny-imagenet`. A setting is a teacher, a student, images and
a length; a variant is a method with its weights. Each run is one `attention-transfer` command with
one thread; finished runs are skipped. The tables are in results/defaults.md.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from attention_transfer.run_folder import RunFolder
from attention_transfer.studies.summaries import (
    Cell,
    TableData,
    merge_lines,
    summarize,
    write_table_data,
)

RESULTS = Path(__file__).parents[1] / "results" / "defaults"
# As in the runs of 2026-11; `--compile` changes only the last bits.
MACHINE = ["--device", "cpu", "--compile", "off"]
CIFAR = ["--data", "cifar10:{data}/cifar10"]
FEW_CIFAR = [*CIFAR, "--student", "wrn-16-1", "--limit-val", "1000"]
TINY = ["--image-size", "64", "--crop-padding", "8", "--batch-size", "64"]
PHOTOS = ["--data", "folder:{data}/tiny-imagenet/pretrain", *TINY]
SCENES = ["--data", "folder:{data}/tiny-imagenet/scenes", *TINY, "--lr", "0.02"]
SHORT = [*PHOTOS, "--limit-train", "4400", "--epochs", "5"]
ADAM = ["--optimizer", "adamw", "--lr", "0.001", "--weight-decay", "0.05", "--no-nesterov"]
DIGITS = ["--recipe", "digits-student", "--epochs", "12"]


@dataclass(frozen=True)
class Setting:
    """A teacher's name, and the arguments of `attention-transfer distill` for its student."""

    teacher: str
    args: list[str]


# By name, the arguments of `attention-transfer train`.
TEACHERS = {
    "digits-wrn-16-2": ["--recipe", "digits-teacher"],
    "digits-wrn-16-1": ["--recipe", "digits-teacher", "--model", "wrn-16-1"],
    "digits-weak": [*DIGITS, "--model", "wrn-10-1", "--limit-train", "3000"],
    "cifar-wrn-16-2": [*CIFAR, "--model", "wrn-16-2", "--limit-val", "2500", "--epochs", "5"],
    "photos-resnet18": [*PHOTOS, "--model", "timm/resnet18", "--epochs", "12", "--lr", "0.1"],
    "scenes-resnet18": [
        *SCENES, "--model", "timm/resnet18", "--epochs", "6",
        "--student-weights", "{out}/teachers/photos-resnet18",
    ],
}  # fmt: skip
SETTINGS = {
    "digits": Setting("digits-wrn-16-2", DIGITS),
    "digits-24-epochs": Setting("digits-wrn-16-2", ["--recipe", "digits-student"]),
    "same-architecture": Setting("digits-wrn-16-1", DIGITS),
    "weaker-teacher": Setting(
        "digits-weak", [*DIGITS, "--student", "wrn-16-2", "--limit-train", "3000"]
    ),
    "cifar-10%": Setting(
        "cifar-wrn-16-2", [*FEW_CIFAR, "--limit-train", "5000", "--epochs", "8"]
    ),
    "cifar-1%": Setting(
        "cifar-wrn-16-2",
        [*FEW_CIFAR, "--limit-train", "500", "--epochs", "30", "--batch-size", "32"],
    ),
    "photos-resnet10": Setting(
        "photos-resnet18", [*SHORT, "--student", "timm/resnet10t", "--lr", "0.1"]
    ),
    "photos-mobilenet": Setting(
        "photos-resnet18", [*SHORT, "--student", "timm/mobilenetv3_small_075", "--lr", "0.1"]
    ),
    "photos-pvt": Setting("photos-resnet18", [*SHORT, "--student", "timm/pvt_v2_b0", *ADAM]),
    "scenes-finetune": Setting(
        "scenes-resnet18",
        [
            *SCENES, "--student", "timm/resnet10t", "--limit-train", "600", "--epochs", "10",
            "--student-weights", "{out}/photos-resnet10/student-alone/seed-0",
        ],
    ),
}  # fmt: skip
SWEEPS = {"authors": (30, 100, 300, 1000, 3000), "caffe": (1, 3, 10, 30, 100)}


def variants() -> dict[str, list[str]]:
    """{name: arguments of `distill`}; the first is the student alone."""
    chosen = {"student alone": ["--method", "none"], "auto": ["--method", "at"]}
    chosen["auto, last two pairs"] = ["--method", "at", "--pairs", "last2"]
    chosen["auto, last pair"] = ["--method", "at", "--pairs", "last1"]
    for convention, betas in SWEEPS.items():
        for beta in betas:
            args = ["--method", "at", "--convention", convention, "--beta", str(beta)]
            chosen[f"{convention}, β = {beta}"] = args
    for beta in (3, 10, 30):
        args = ["--convention", "caffe", "--beta", str(beta), "--decay", "linear"]
        chosen[f"caffe, β = {beta}, linear"] = ["--method", "at", *args]
    for alpha, temperature in ((0.9, 4), (0.5, 4), (0.9, 2), (0.5, 2)):
        args = ["--method", "kd", "--alpha", str(alpha), "--temperature", str(temperature)]
        chosen[f"KD, α = {alpha}, T = {temperature}"] = args
    chosen["KD, warm-up"] = ["--method", "kd", "--decay", "kd=warm-up"]
    chosen["AT+KD, auto"] = ["--method", "at+kd"]
    for beta in ("10000", "auto"):
        chosen[f"F-ActT, β = {beta}"] = ["--method", "full", "--beta", beta]
    chosen["AT+KD, auto, α = 0.5"] = ["--method", "at+kd", "--alpha", "0.5"]
    return chosen


VARIANTS = variants()


def folder_of(out: Path, setting: str, variant: str) -> Path:
    """The folder of a variant's seeds: `authors, β = 30` -> `authors-30`."""
    return out / setting / re.sub(r"[^\w.+]+", "-", variant.replace("β = ", ""))


def run(out: Path, data: str, command: str, args: list[str], folder: Path) -> None:
    """One run, if it is not finished."""
    if RunFolder(folder).finished:
        return
    args = [word.format(data=data, out=out) for word in args]
    argv = [sys.executable, "-m", "attention_transfer", command, *args, *MACHINE]
    done = subprocess.run(
        [*argv, "--out", str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    print(folder, done.stderr.strip() or "done", flush=True)


def students(
    out: Path, settings: list[str], names: list[str], seeds: int
) -> Iterator[tuple[list[str], Path]]:
    """(arguments, folder) of the students, seed by seed."""
    for seed in range(seeds):
        for setting in settings:
            for name in names:
                chosen = SETTINGS[setting]
                args = [*chosen.args, *VARIANTS[name], "--seed", str(seed)]
                if name != "student alone":
                    args += ["--teacher", str(out / "teachers" / chosen.teacher)]
                yield args, folder_of(out, setting, name) / f"seed-{seed}"


def collect(out: Path) -> None:
    """Writes the finished runs of each setting as JSON lines."""
    for setting in SETTINGS:
        cells = []
        for name in VARIANTS:
            folders = sorted(folder_of(out, setting, name).glob("seed-*"))
            lines = merge_lines(summarize(RunFolder(folder)) for folder in folders)
            if lines:
                cells.append(Cell("", name, lines))
        if cells:
            head = {"title": setting, "columns": ["seeds", "mean", "each", "against alone"]}
            write_table_data(RESULTS / f"{setting}.jsonl", TableData(head, cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "collect"))
    parser.add_argument("data", nargs="?")
    parser.add_argument("--out", type=Path, default=Path("runs/defaults"))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if options.what == "collect":
        collect(options.out)
        return
    if options.data is None:
        parser.error("run needs DATA, the folder of cifar10 and tiny-imagenet")
    for name, args in TEACHERS.items():
        folder = options.out / "teachers" / name
        run(options.out, options.data, "train", args, folder)
    jobs = students(options.out, options.settings, options.variants, options.seeds)
    with ThreadPoolExecutor(options.jobs) as pool:
        for args, folder in jobs:
            pool.submit(run, options.out, options.data, "distill", args, folder)


if __name__ == "__main__":
    main()
