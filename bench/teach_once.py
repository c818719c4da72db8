"""Measures a store of the teacher's maps and logits: steps of AT+KD, and reading the store.

    python bench/teach_once.py --rounds 7 --steps 6 --json results/bench/teach-once.json

For each pair of networks: the student alone, AT+KD with the teacher in the step (live), AT+KD from
a full store (kept), and for WRN the authors' step. Networks have random weights. Then the rate of
reading rows: from memory, from files in the system's cache (warm), and from the disk (cold, if the
system can drop files from its cache).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from harness import main
from lightning.fabric import Fabric
from rich.console import Console
from torch import Tensor, nn

from attention_transfer.bench import BenchOptions
from attention_transfer.bench.authors import authors_step
from attention_transfer.bench.measure import (
    BenchRow,
    Measure,
    interleave,
    median_ratio,
    report,
    timed,
)
from attention_transfer.bench.workload import random_batch, start, training_step
from attention_transfer.methods.options import MethodOptions
from attention_transfer.methods.registry import create_methods
from attention_transfer.models.create import create_model
from attention_transfer.models.network import fixed_size
from attention_transfer.models.trained import Preprocess
from attention_transfer.runtime.resolve import RuntimeConfig
from attention_transfer.store.create import create_store
from attention_transfer.store.store import TeacherStore
from attention_transfer.transfer import Transfer

HALVES = (0.5, 0.5, 0.5)
CHUNK = 500  # number of rows written at a time
LARGE_BATCH = 32  # for networks for photographs, on a CPU


@dataclass(frozen=True)
class Setting:
    """A pair of networks at an image size; the store has `images` images."""

    teacher: str
    student: str
    size: int
    pairs: str
    images: int

    @property
    def name(self) -> str:
        return f"{self.teacher} → {self.student}, {self.size} px"


SETTINGS = (
    Setting("wrn-16-2", "wrn-16-1", 32, "auto", 50_000),
    Setting("timm/resnet50", "timm/resnet18", 64, "last3", 20_000),
    Setting("timm/resnet50", "timm/resnet18", 224, "last3", 20_000),
    Setting("timm/vit_base_patch16_224", "timm/resnet18", 64, "auto", 20_000),
    Setting("timm/vit_base_patch16_224", "timm/resnet18", 224, "auto", 20_000),
)


def run(options: BenchOptions, console: Console, json_file: Path | None) -> None:
    runtime, fabric = start(options)
    rows: list[BenchRow] = []
    for setting in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            rows += _measure(setting, options, runtime, fabric, Path(folder))
    report("teach once", rows, options, runtime, console, json_file)


def _measure(
    setting: Setting, options: BenchOptions, runtime: RuntimeConfig, fabric: Fabric, folder: Path
) -> list[BenchRow]:
    torch.compiler.reset()  # torch compiles a function at most eight times, then runs it eagerly
    is_small = setting.teacher.startswith("wrn-")
    if not is_small and fabric.device.type == "cpu":
        options = replace(options, batch_size=min(options.batch_size, LARGE_BATCH))
    batch = random_batch(options.batch_size, fabric.device, setting.size)
    example = torch.rand(2, 3, setting.size, setting.size)
    teacher, transform = _teacher(setting)
    live = _transfer(setting, teacher, example, transform)
    layers = [layer for _, layer in live.pairs]
    store = create_store(
        folder / "store",
        teacher,
        example,
        images=setting.images,
        layers=layers,
        teacher_transform=transform,
    )
    _fill(store)
    kept = _transfer(setting, store, example)
    assert isinstance(kept.store, TeacherStore)
    read = _reader(kept.store, options.batch_size, fabric.device)

    def step(transfer: Transfer, teacher_output: Callable[[], object] = lambda: None) -> Measure:
        run_step = training_step(transfer.to(fabric.device), batch, runtime, fabric, teacher_output)  # type: ignore[arg-type]
        return timed(run_step, options.steps, options.batch_size, fabric.device)

    with ExitStack() as processes:
        measures = {"student": step(_transfer(setting, None, example)), "live": step(live)}
        measures["kept"] = step(kept, read)
        if is_small:
            measures["authors"] = processes.enter_context(authors_step(options, fabric.device))
        baselines = dict.fromkeys(measures, "authors" if is_small else "live")
        rows = interleave(measures, options.rounds, baselines)
    by_name = {row.name: row for row in rows}
    for row in rows:
        row.extra["times_alone"] = median_ratio(row, by_name["student"])
        row.extra["times_live"] = median_ratio(row, by_name["live"])
        if not is_small:
            row.extra["times_authors"] = None
    rows += _measure_reading(kept.store, folder, options)
    for row in rows:
        row.name = f"{setting.name}: {row.name}"
    return rows


def _measure_reading(store: TeacherStore, folder: Path, options: BenchOptions) -> list[BenchRow]:
    """Rows per second, without a training step."""
    said = store.read(torch.arange(store.header.images.count))
    assert said.maps is not None
    resident = [said.logits, *said.maps.values()]
    draws = _draws(store.header.images.count, options.batch_size)

    def from_memory() -> None:
        rows = next(draws)
        for tensor in resident:
            assert tensor is not None
            tensor.index_select(0, rows)

    device = torch.device("cpu")
    warm = _reader(store, options.batch_size, device)
    measures: dict[str, Measure] = {
        "read from memory": timed(from_memory, options.steps * 10, options.batch_size),
        "read warm": timed(warm, options.steps * 10, options.batch_size),
    }
    cold = _copy(store.folder, folder / "cold")
    if hasattr(os, "posix_fadvise"):

        def read_cold() -> float:
            # A mapped file stays in memory, so each measurement opens the store again.
            _drop(cold)
            opened = TeacherStore(cold)
            measure = timed(
                _reader(opened, options.batch_size, device), options.steps, options.batch_size
            )
            return measure()

        measures["read cold"] = read_cold
    baselines = dict.fromkeys(measures, "read from memory")
    rows = interleave(measures, options.rounds, baselines)
    for row in rows:
        row.extra["times_authors"] = None
    return rows


def _teacher(setting: Setting) -> tuple[nn.Module, Preprocess]:
    torch.manual_seed(0)
    teacher = create_model(setting.teacher, 10).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return teacher, Preprocess(HALVES, HALVES, fixed_size(teacher))


def _transfer(
    setting: Setting,
    teacher: nn.Module | TeacherStore | None,
    example: Tensor,
    transform: nn.Module | None = None,
) -> Transfer:
    torch.manual_seed(0)
    student = create_model(setting.student, 10).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    method = "none" if teacher is None else "at+kd"
    methods = create_methods(MethodOptions(method=method, beta=None if teacher is None else 1000.0))
    return Transfer(
        student,
        teacher,
        methods,
        setting.pairs,
        example,
        student_transform=Preprocess(HALVES, HALVES),
        teacher_transform=transform,
    )


def _fill(store: TeacherStore) -> None:
    """Random logits and maps for all images."""
    shapes = {entry.layer: entry.shape[2:] for entry in store.header.arrays if entry.layer}
    for start_row in range(0, store.header.images.count, CHUNK):
        rows = torch.arange(start_row, min(start_row + CHUNK, store.header.images.count))
        features = {layer: torch.rand(len(rows), 1, *shape) for layer, shape in shapes.items()}
        store.add(rows, 0, torch.randn(len(rows), store.classes), features)


def _reader(store: TeacherStore, batch_size: int, device: torch.device) -> Callable[[], object]:
    """Reads a random batch, another one at each call."""
    draws = _draws(store.header.images.count, batch_size)

    def read() -> object:
        rows = next(draws)
        assert store.has(rows)
        return store.read(rows, 0, device)

    return read


def _draws(count: int, batch_size: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from torch.randperm(count, generator=generator).split(batch_size)[:-1]


def _copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.glob("[!.]*"):
        (target / file.name).write_bytes(file.read_bytes())
    return target


def _drop(folder: Path) -> None:
    """Asks the system to drop what it has of these files in memory."""
    for file in folder.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main(__doc__, run)
