"""Runs the teacher once on each view of each image, and stores its outputs."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from lightning.fabric import Fabric
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ..apply.inference import as_input
from ..data.dataset import Dataset
from ..data.stream import NoReadableImageError
from ..errors import RunError
from ..store.options import TeachOptions
from ..store.store import TeacherStore
from .images import make_loader

Teacher = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


def fill(
    options: TeachOptions,
    store: TeacherStore,
    data: Dataset,
    teacher: Teacher,
    fabric: Fabric,
    console: Console,
) -> None:
    """Adds the missing outputs; each process runs the teacher on its share of the images."""
    rank, world = fabric.global_rank, fabric.world_size
    loader = make_loader(options, data.train, fabric.device, rank, world)
    share = torch.arange(len(data.train))[rank::world]
    views = store.header.view_count
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=views * len(share))
        for view in range(views):
            index = share[~store.filled(data.train.rows[share], view)]
            progress.update(task, description=f"view {view + 1}/{views}")
            progress.advance(task, len(share) - len(index))
            if not len(index):
                continue
            start = time.perf_counter()
            # The last batch is filled up with the first images: a compiled teacher takes one shape.
            size = min(options.batch_size, len(index))
            padded = index[torch.arange(-(-len(index) // size) * size) % len(index)]
            plan = loader.view_plan(view, padded, size)
            for step in range(len(plan)):
                progress.advance(task, min(size, len(index) - step * size))
                try:
                    x, _, rows = loader.batch(plan, step)
                except NoReadableImageError:
                    continue  # `teach` counts the missing views at the end
                with fabric.autocast():
                    logits, features = teacher(as_input(x))
                store.add(rows, view, logits, features)
                if store.note is not None:
                    raise RunError(
                        f"{store.note}: the outputs so far are kept; make room and run the "
                        "command again"
                    )
            rate = len(index) * fabric.world_size / (time.perf_counter() - start)
            console.out(f"view {view + 1}/{views}: {rate:,.0f} images/s")
