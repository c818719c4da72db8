"""Runs so small that a test can afford several, and the data that they need."""

from __future__ import annotations

import io
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SMALL: dict[str, Any] = {
    "command": "train",
    "model": "wrn-10-1",
    "limit_train": 128,
    "limit_val": 100,
    "epochs": 2,
    "batch_size": 32,
    "flip": False,
    "device": "cpu",
    "compile": "off",
}
STEPS_PER_EPOCH = 4
FLAGS = "--limit-train 128 --limit-val 100 --epochs 2 --batch-size 32 --device cpu --compile off"
TIMES = ("images_per_second", "seconds")
FACTORY = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, norm):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), norm(8), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), norm(8), nn.ReLU())
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        return self.fc(self.two(self.one(x)).mean((2, 3)))

def make(num_classes):
    return Net(num_classes, nn.Identity)

def make_normalised(num_classes):
    return Net(num_classes, nn.BatchNorm2d)
"""


@dataclass
class Said:
    """What a command left: its exit status and its two streams."""

    status: int
    out: str
    err: str


Command = Callable[[str], Said]


def small(**options: Any) -> Any:
    """The recipe of a small run, with `options` over it."""
    from attention_transfer.config import make_recipe

    return make_recipe(SMALL, options)


def distilled(teacher: Path, method: str = "at+kd", **options: Any) -> Any:
    """The recipe of a small distillation; the β suits its few steps."""
    if "at" in method:
        options = {"beta": 1.0} | options
    return small(command="distill", teacher=str(teacher), method=method, **options)


def carry_out(recipe: Any, out: Path) -> str:
    """Runs `recipe` into `out`, report and all; what it said."""
    from rich.console import Console

    from attention_transfer.launch import run_and_report
    from attention_transfer.run_folder import RunFolder

    stream = io.StringIO()
    run_and_report(recipe, RunFolder(out), Console(file=stream, width=200))
    return stream.getvalue()


def rows(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the times."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by its relative path."""
    return {
        str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()
    }


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[Any], None]) -> None:
    """Calls `action` on the trainer when it has done `step` steps."""
    from attention_transfer.train.trainer import Trainer

    original = Trainer.train_step

    def watched(self: Any, *batch: Any) -> None:
        original(self, *batch)
        if self.step == step:
            action(self)

    monkeypatch.setattr(Trainer, "train_step", watched)


def request_stop(trainer: Any) -> None:
    """For `stop_after`: as if Ctrl-C had come."""
    trainer.stop.received = True


def write_factory(folder: Path, factory: str = "make") -> str:
    """A user's own network as FILE.py:FACTORY; `make_normalised` has batch normalisation."""
    (folder / "net.py").write_text(FACTORY)
    return f"{folder / 'net.py'}:{factory}"


def write_folder(
    folder: Path, classes: int = 11, train: int = 4, val: int = 2, size: int = 16
) -> Path:
    """A `folder:` data set of PNGs, each class of its own brightness."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for label in range(classes):
            place = folder / part / f"class{label:02}"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = (
                    (20 * label + rng.integers(0, 30, (size, size, 3)))
                    .clip(0, 255)
                    .astype(np.uint8)
                )
                Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


def write_parquet(folder: Path, labels: Sequence[int], classes: int) -> Path:
    """A `parquet:` data set in Hugging Face's layout whose validation set has these labels."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "png")
    names = [f"class{i}" for i in range(classes)]
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    folder.mkdir()
    for part, values in (("train", [i % classes for i in range(8)]), ("validation", labels)):
        image = pa.array([{"bytes": stream.getvalue(), "path": None}] * len(values))
        table = pa.table(
            {"image": image, "label": pa.array(values, pa.int64())}
        ).replace_schema_metadata(about)
        pq.write_table(table, folder / f"{part}-00000-of-00001.parquet")
    return folder


def _no_measuring(network: Any, image_size: tuple[int, int]) -> dict[str, Any]:
    """In the place of `apply.inference.profile`, which times the network for a second or more."""
    parameters = sum(p.numel() for p in network.module.parameters())
    speed = {"images_per_second": 1000.0, "batch_size": 128, "latency_ms": 1.0}
    return {"parameters": parameters, "flops": 1_000_000, "inference": speed}


@cache
def _scenes() -> Any:
    from attention_transfer.data.digits import open_digits

    return open_digits()


@contextmanager
def _quick() -> Iterator[None]:
    scenes = _scenes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attention_transfer.data.digits.open_digits", lambda: scenes)
        patch.setattr("attention_transfer.train.finish.profile", _no_measuring)
        yield


@pytest.fixture
def quick_runs() -> Iterator[None]:
    """Saves time: draws the scenes only once, and does not measure the speed of networks."""
    with _quick():
        yield


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `train`, for reading only."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    with _quick():
        carry_out(small(), out)
    return out


@pytest.fixture(scope="session")
def student_run(teacher_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `distill --method at+kd` from `teacher_run`, for reading only."""
    out = tmp_path_factory.mktemp("student") / "run"
    with _quick():
        carry_out(distilled(teacher_run), out)
    return out


@pytest.fixture
def command(
    quick_runs: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Command:
    """Runs a command line in this process, in the test's own folder."""
    from attention_transfer import cli

    monkeypatch.chdir(tmp_path)

    def run(line: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["attention-transfer", *shlex.split(line)])
        capfd.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        return Said(status, *capfd.readouterr())

    return run
