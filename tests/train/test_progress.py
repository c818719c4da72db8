"""What a run prints while it trains."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from attention_transfer.train.progress import ProgressBar

ROW = {
    "epoch": 2,
    "step": 57,
    "train_loss": 1.2345,
    "val_accuracy": 0.7,
    "images_per_second": 1234.5,
}
LINE = "epoch 2/12, step 57: train loss 1.234, validation error 30.00 %, 1,234 images/s\n"


def printed(is_terminal):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=is_terminal, width=120)
    with ProgressBar(console, "at wrn-10-1", epochs=12) as progress:
        progress.begin(2, 29, 57)
        progress.end(ROW)
    return stream.getvalue()


def test_a_log_file_has_a_line_an_epoch():
    assert printed(is_terminal=False) == LINE


def test_a_terminal_has_the_live_line_alone():
    text = printed(is_terminal=True)
    assert "val 30.00 % error" in text
    assert "validation error" not in text


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_the_live_line_fits_the_terminal(width):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width)
    with ProgressBar(console, "at+kd wrn-16-1", epochs=200) as progress:
        progress.begin(12, 100, 782)
        progress._show(300, 12345.6, "ce 0.123 at 0.456 kd 0.789")
        progress.bar.refresh()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).splitlines()
    assert all(len(line) <= width and "…" not in line for line in lines)
    assert "epoch 12/200 · step 300/782" in lines[-1] or "epoch 12/200 · step 300/782" in lines[-2]
    assert ("ce 0.123" in stream.getvalue()) == (width >= 80)
