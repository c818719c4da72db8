"""What a person sees while a run is training: one line that lives, where there is a terminal; else nothing."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from .meter import Meter


class ProgressBar:
    """Epoch, step, images/s, time left and losses by part; sums are read from the device once a second at most."""

    def __init__(self, console: Console, title: str, epochs: int):
        self.console = console
        self.title = title
        self.epochs = epochs
        self.bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn(
                "step {task.completed:.0f}/{task.total:.0f} · {task.fields[rate]} · {task.fields[losses]}"
            ),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.task = self.bars.add_task(title, total=1, rate="", losses="")
        self._read = time.monotonic()
        self._step = 0

    def __enter__(self) -> ProgressBar:
        self.bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, epoch: int, step: int, total: int) -> None:
        self._step = step
        self._read = time.monotonic()
        self.bars.update(
            self.task,
            description=f"{self.title} epoch {epoch}/{self.epochs}",
            completed=step,
            total=total,
        )

    def tick(self, step: int, batch_size: int, meter: Meter) -> None:
        now = time.monotonic()
        if self.bars.disable or now - self._read < 1:
            return
        sums = (meter.sums / meter.images).tolist()
        losses = " ".join(
            f"{name} {value:.3f}" for name, value in zip(meter.parts, sums[2:], strict=True)
        )
        rate = (step - self._step) * batch_size / (now - self._read)
        self._step, self._read = step, now
        self.bars.update(self.task, completed=step, rate=f"{rate:,.0f} images/s", losses=losses)

    def end(self, row: dict[str, Any]) -> None:
        self.bars.update(
            self.task,
            completed=row["step"],
            rate=f"{row['images_per_second']:,.0f} images/s",
            losses=f"val {100 * (1 - row['val_accuracy']):.2f} % error",
        )
