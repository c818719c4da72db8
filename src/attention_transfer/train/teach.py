"""`teach`: stores a teacher's outputs for fixed views of the images."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..apply.evaluate import EVALUATION_BATCH, evaluate
from ..apply.inference import InferenceModel, as_input
from ..data.dataset import Dataset
from ..data.options import check_augment
from ..errors import UserError
from ..models.network import Network
from ..models.start import check_network, load_network
from ..runtime import ranks
from ..runtime.process import make_fabric, set_up_process
from ..runtime.resolve import RuntimeConfig, count_flops, resolve_runtime
from ..store.header import Header, is_store
from ..store.options import TeachOptions
from ..store.store import TeacherStore
from ..taps import Tap
from . import fill_store
from .images import open_images
from .open_store import plan_for


def teach(options: TeachOptions, console: Console) -> dict[str, Any]:
    """Fills the store `options.out`, or continues filling it.

    Returns its size and the teacher's numbers in the first process, and {} in the others.

    Raises:
        UserError: for wrong options, data or networks, and for a folder with other content.
        RunError: if the store cannot be written, as on a full disk; stored outputs are kept.
    """
    if options.views is None:
        raise UserError("--views is required: the number of fixed views of each image, such as 4")
    check_augment(options, options.stream)
    if is_store(options.teacher):
        raise UserError(f"{options.teacher} is a store itself: expected the teacher's network")
    if options.compile == "graphs":
        raise UserError("--compile graphs replays steps of training: choose --compile on")
    devices, nodes = ranks.resolve_processes(options)
    options = replace(options, devices=devices, nodes=nodes)
    if not options.dry_run:
        ranks.join(options)
    with ranks.propagate_failures():
        return _teach(options, console)


def _teach(options: TeachOptions, console: Console) -> dict[str, Any]:
    assert options.views is not None, "`teach` has checked it"
    # The seed draws subsets only, and a store has all training images.
    data = open_images(options, options.augment, options, seed=0)
    classes = data.classes, data.mean, data.std
    network = load_network(
        options.teacher, *classes, options.teacher_weights, trust_code=options.trust_code
    )
    example = as_input(data.train.batch(slice(0, 2)))
    check_network(network, example, f"the teacher {options.teacher}")
    flops = count_flops(network.module, network.preprocess(example[:1]))
    runtime = resolve_runtime(options, float(flops * len(data.train) * options.views))
    header = plan_for(options, options, data, network, example, options.layers, options.map_options)
    if options.dry_run:
        print_plan(header, options.out, console)
        return _store_numbers(header, options.out)
    fabric = make_fabric(options, set_up_process(runtime))
    if not fabric.is_global_zero:
        console = Console(quiet=True)
    store = TeacherStore.create(options.out, header)
    if layers := header.layers:
        store = store.select(layers, options.map_options)
    _print_start(store, data, runtime, console)
    teacher = _make_teacher(network, store, example, fabric, runtime)
    fill_store.fill(options, store, data, teacher, fabric, console)
    fabric.barrier()
    if not fabric.is_global_zero:
        return {}
    missing = _conclude(store, network, data, flops, runtime.precision, console)
    return _store_numbers(store.header, store.folder) | {"missing_views": missing}


def _conclude(
    store: TeacherStore,
    network: Network,
    data: Dataset,
    flops: int,
    precision: str,
    console: Console,
) -> int:
    """Writes the teacher's validation accuracy into the store.

    Returns the number of missing views.
    """
    device = next(network.module.parameters()).device
    numbers = {"parameters": float(sum(p.numel() for p in network.module.parameters()))}
    numbers["flops"] = float(flops)
    model = InferenceModel(network.module, network.preprocess, precision).eval()
    measured = evaluate(model, data.val.to(device), EVALUATION_BATCH, device)
    numbers |= {f"val_{name}": value for name, value in measured.items()}
    store.record(numbers)
    missing = store.count_missing(data.train.rows, range(store.header.view_count))
    unreadable = ""
    if missing:
        unreadable = f"; {missing} views are of images that cannot be read"
    console.out(
        f"{store.folder}: the teacher has {100 * (1 - measured['accuracy']):.2f} % validation "
        f"error; distill --teacher {store.folder} learns from it{unreadable}"
    )
    return missing


def _store_numbers(header: Header, folder: Path) -> dict[str, Any]:
    arrays = {entry.name: list(entry.shape) for entry in header.arrays}
    return {
        "store": str(folder),
        "teacher": header.teacher.name,
        "data": header.images.spec,
        "images": header.images.count,
        "views": header.view_count,
        "dtype": header.dtype,
        "bytes": header.bytes,
        "arrays": arrays,
        **header.teacher.numbers,
    }


def _make_teacher(
    network: Network,
    store: TeacherStore,
    example: Tensor,
    fabric: Fabric,
    runtime: RuntimeConfig,
) -> fill_store.Teacher:
    """Images (B, 3, H, W) in [0, 1] -> logits and the features of the store's layers."""
    module = network.module.to(memory_format=torch.channels_last).eval()
    inputs, attention = network.preprocess(example), store.reads_attention
    # Before the move to the device, because the example is on the CPU.
    tap = Tap(module, store.layers, inputs, attention=attention)
    module.to(fabric.device)
    preprocess = network.preprocess.to(fabric.device)

    def run_teacher(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            logits, features = tap(preprocess(x))
            return logits, features

    teacher: fill_store.Teacher = run_teacher
    if runtime.compile:
        teacher = torch.compile(run_teacher, dynamic=False)
    return teacher


def print_plan(header: Header, folder: Path, console: Console) -> None:
    """Prints the size of each array, the total, and the free disk space."""
    table = Table("array", "shape", "MB", title=f"{folder}", title_justify="left")
    for entry in header.arrays:
        table.add_row(entry.name, "×".join(map(str, entry.shape)), f"{entry.bytes / 1e6:,.1f}")
    console.print(table)
    console.out(f"{_size_text(header)}; {_free_bytes(folder) / 1e6:,.0f} MB of the disk are free")


def _print_start(
    store: TeacherStore, data: Dataset, runtime: RuntimeConfig, console: Console
) -> None:
    header, views = store.header, range(store.header.view_count)
    missing = store.count_missing(data.train.rows, views)
    done = 1 - missing / (len(data.train) * len(views))
    console.out(
        f"{header.teacher.name} on {header.images.spec}: {_size_text(header)}; {done:.0%} "
        f"computed already; {runtime.device}, {runtime.precision}"
    )
    free = _free_bytes(store.folder)
    if free < (1 - done) * header.bytes:
        console.out(f"warning: only {free / 1e6:,.0f} MB are free on the disk of {store.folder}")


def _size_text(header: Header) -> str:
    return (
        f"{header.view_count} views of {header.images.count} images in {header.dtype}: "
        f"{header.bytes / 1e6:,.1f} MB"
    )


def _free_bytes(folder: Path) -> int:
    """The free space of the disk of a folder, which need not exist yet."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free
