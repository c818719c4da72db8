"""What a run prints while it trains."""

from __future__ import annotations

import io

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
