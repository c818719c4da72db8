"""Lists the trained networks that come with the package."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..run_folder import RunFolder
from .formats import data_name


@dataclass(frozen=True)
class ZooEntry:
    """A network of the list, with facts from its model card."""

    name: str  # zoo:NAME
    model: str
    data: str
    classes: int
    error: float  # in percent, of the stored weights
    bytes: int
    command: str

    @classmethod
    def read(cls, name: str) -> ZooEntry:
        """The entry of `zoo:NAME`."""
        folder = RunFolder(name)
        summary, environment = folder.summary() or {}, folder.environment()
        return cls(
            name=name,
            model=summary["model"],
            data=summary["data"],
            classes=len(summary["classes"]),
            error=100 * (1 - summary["stored_accuracy"]),
            bytes=folder.student_file.stat().st_size,
            command=shlex.join(environment.get("command", [])),
        )


def print_zoo(entries: Sequence[ZooEntry], console: Console) -> None:
    """Lists the networks, with the command that trained each."""
    if not entries:
        console.print("this version of the package has no trained networks")
        return
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("name", no_wrap=True)
    table.add_column("network", overflow="fold")
    table.add_column("data", overflow="fold")
    for header in ("classes", "error %", "MB"):
        table.add_column(header, justify="right")
    for entry in entries:
        table.add_row(
            entry.name,
            entry.model,
            data_name(entry.data),
            str(entry.classes),
            f"{entry.error:.2f}",
            f"{entry.bytes / 1e6:.1f}",
        )
    console.print(table)
    console.print()
    for entry in entries:
        console.out(f"{entry.name}: {entry.command}")
