"""Progress of training: one live line in a terminal, otherwise a line for each epoch."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task
from rich.text import Text

from .meter import Meter

REFRESH_SECONDS = 1  # reading the meter synchronises with the device
WIDTH_FOR_BAR = 110  # of a terminal, in columns


class _Line(ProgressColumn):
    """Epoch, step, time left, losses, speed and title, cut to the width of the terminal."""

    def __init__(self, console: Console):
        super().__init__()
        self.console = console

    def render(self, task: Task) -> Text:
        room = self.console.width - 4  # beside the spinner
        if self.console.width >= WIDTH_FOR_BAR:
            room -= 21  # the bar of 20 columns and a space
        parts = [task.description, f"step {task.completed:.0f}/{task.total or 0:.0f}"]
        if task.time_remaining is not None:
            parts.append(f"{timedelta(seconds=round(task.time_remaining))} left")
        parts += [task.fields["losses"], task.fields["rate"], task.fields["title"]]
        line = parts[0]
        for part in filter(None, parts[1:]):
            if len(line) + 3 + len(part) > room:
                break
            line += f" · {part}"
        return Text(line, no_wrap=True)


class ProgressBar:
    """Epoch, step, images per second, time left and the terms of the loss."""

    def __init__(self, console: Console, title: str, epochs: int):
        self.console, self.title, self.epochs = console, title, epochs
        columns: list[ProgressColumn] = [SpinnerColumn(), _Line(console)]
        if console.width >= WIDTH_FOR_BAR:
            columns.insert(1, BarColumn(bar_width=20))
        self.bar = Progress(
            *columns,
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task("", total=1, rate="", losses="", title=title)
        self._last_time = time.monotonic()
        self._last_step = 0

    def __enter__(self) -> ProgressBar:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        """Prints a permanent line above the progress bar."""
        self.console.out(text)

    def begin(self, epoch: int, step: int, total: int) -> None:
        self._last_step, self._last_time = step, time.monotonic()
        title = f"epoch {epoch}/{self.epochs}"
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
        # A log file keeps every line, so it gets one line for each epoch.
        self.say(
            f"epoch {row['epoch']}/{self.epochs}, step {row['step']}: "
            f"train loss {row['train_loss']:.3f}, validation error {error}, "
            f"{row['images_per_second']:,.0f} images/s"
        )

    def _show(self, step: int, rate: float, losses: str) -> None:
        self.bar.update(self.task, completed=step, rate=f"{rate:,.0f} images/s", losses=losses)
