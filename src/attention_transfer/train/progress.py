"""What a person sees during training: one live line in a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from .meter import Meter

REFRESH_SECONDS = 1  # reading the meter synchronises with the device


class ProgressBar:
    """Epoch, step, images per second, time left and the terms of the loss."""

    def __init__(self, console: Console, title: str, epochs: int):
        self.console, self.title, self.epochs = console, title, epochs
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("step {task.completed:.0f}/{task.total:.0f} · {task.fields[rate]}"),
            TextColumn("· {task.fields[losses]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task(title, total=1, rate="", losses="")
        self._last_time = time.monotonic()
        self._last_step = 0

    def __enter__(self) -> ProgressBar:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, epoch: int, step: int, total: int) -> None:
        self._last_step, self._last_time = step, time.monotonic()
        title = f"{self.title} epoch {epoch}/{self.epochs}"
        self.bar.update(self.task, description=title, completed=step, total=total)

    def update(self, step: int, batch_size: int, meter: Meter) -> None:
        seconds = time.monotonic() - self._last_time
        if self.bar.disable or seconds < REFRESH_SECONDS:
            return
        means = (meter.sums[2:] / meter.images).tolist()
        losses = " ".join(f"{t} {mean:.3f}" for t, mean in zip(meter.terms, means, strict=True))
        rate = (step - self._last_step) * batch_size / seconds
        self._last_step, self._last_time = step, time.monotonic()
        self._show(step, rate, losses)

    def end(self, row: dict[str, Any]) -> None:
        error = f"{100 * (1 - row['val_accuracy']):.2f} %"
        if self.console.is_terminal:
            self._show(row["step"], row["images_per_second"], f"val {error} error")
            return
        # A log file keeps every line, so it gets few.
        self.say(
            f"epoch {row['epoch']}/{self.epochs}, step {row['step']}: "
            f"train loss {row['train_loss']:.3f}, validation error {error}, "
            f"{row['images_per_second']:,.0f} images/s"
        )

    def _show(self, step: int, rate: float, losses: str) -> None:
        self.bar.update(self.task, completed=step, rate=f"{rate:,.0f} images/s", losses=losses)
