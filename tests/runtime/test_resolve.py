"""Which images a run sees, and how long it goes on."""

from __future__ import annotations

import shutil

import pytest
import torch
from small_runs import (
    STEPS_PER_EPOCH,
    carry_out,
    distilled,
    rows,
    small,
    write_factory,
    write_folder,
)

from attention_transfer.errors import UserError
from attention_transfer.train.assemble import assemble
from attention_transfer.train.optimizer import make_scheduler

pytestmark = pytest.mark.usefixtures("quick_runs")


def seen(**options):
    """Labels and images that a run with these options would train on."""
    data = assemble(small(**options)).data
    return data.train.labels, data.train.images


def test_limits_are_balanced_and_seeded():
    data = assemble(small(limit_train=125, limit_val=50)).data
    assert sorted(torch.bincount(data.train.labels).tolist()) == [12] * 5 + [13] * 5
    assert torch.bincount(data.val.labels).tolist() == [5] * 10
    (_, first), (_, same), (_, other) = seen(seed=0), seen(seed=0), seen(seed=1)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_val_split_leaves_the_test_set_alone(tmp_path):
    data = write_folder(tmp_path / "data", classes=3, train=10)
    shutil.rmtree(data / "val")
    words = {"data": f"folder:{data}", "limit_train": None, "limit_val": None, "batch_size": 8}
    cut = assemble(small(**words)).data
    assert (
        torch.bincount(cut.val.labels).tolist() == [1] * 3
    )  # a tenth, where there is no set of its own
    found = assemble(small(**words, val_split=0.2)).data
    assert torch.bincount(found.val.labels).tolist() == [2] * 3
    assert torch.bincount(found.train.labels).tolist() == [8] * 3
    assert not set(found.train.files) & set(found.val.files)
    assert all(name.startswith("train/") for name in found.train.files + found.val.files)
    carry_out(small(**words, val_split=0.2, epochs=1), tmp_path / "run")


@pytest.mark.parametrize("steps", [1, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1, 100])
def test_max_steps(tmp_path, steps):
    carry_out(small(model=write_factory(tmp_path), max_steps=steps), tmp_path / "run")
    last = min(steps, 2 * STEPS_PER_EPOCH)
    assert [row["step"] for row in rows(tmp_path / "run")] == sorted(
        {min(STEPS_PER_EPOCH, last), last}
    )


def test_a_set_smaller_than_a_batch(tmp_path):
    carry_out(small(model=write_factory(tmp_path), limit_train=20), tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("total", range(1, 9))
@pytest.mark.parametrize("schedule", ["step", "one-cycle", "cosine", "constant"])
def test_every_schedule_of_every_length(schedule, total):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    recipe = small(schedule=schedule, lr=0.1, milestones=[2, 3])
    scheduler = make_scheduler(recipe, optimizer, 2, total)
    rates = []
    for step in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step + 1 < total:
            scheduler.step()
    assert all(0 < rate <= 0.1 + 1e-12 for rate in rates)
    if schedule == "constant":
        assert rates == [0.1] * total
    if schedule == "step":  # at the start of epochs 2 and 3, of two steps each
        assert rates == pytest.approx(([0.1] * 2 + [0.02] * 2 + [0.004] * 4)[:total])
    if schedule == "cosine":
        assert rates[0] == 0.1
        assert rates == sorted(rates, reverse=True)


def test_one_cycle_rises_for_a_quarter_and_ends_near_zero():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.2)
    scheduler = make_scheduler(small(schedule="one-cycle", lr=0.2), optimizer, 10, 40)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(39):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.02)
    assert rates[9] == pytest.approx(0.2)
    assert rates[-1] == pytest.approx(0.02 / 1e4)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_a_network_that_puts_out_no_logits(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Conv2d(3, 4, 3)\n"
    )
    with pytest.raises(UserError, match=r"returns .* \(\d+, 4, 30, 30\): expected logits"):
        assemble(small(model=f"{tmp_path / 'net.py'}:make"))


def test_bf16_rounds_neither_images_nor_progress(tmp_path, teacher_run, monkeypatch):
    """A schedule in bfloat16 would stand still for a hundred steps of a long run."""
    from attention_transfer.transfer import Transfer

    dtypes = []
    original = Transfer.forward

    def watched(self, x, y, progress=None, **options):
        dtypes.append((x.dtype, getattr(progress, "dtype", None), torch.is_autocast_enabled("cpu")))
        return original(self, x, y, progress, **options)

    monkeypatch.setattr(Transfer, "forward", watched)
    carry_out(distilled(teacher_run, precision="bf16", max_steps=2), tmp_path / "run")
    # The measurements before and after the epoch have a number for the progress.
    trained = [seen for seen in dtypes if seen[1] is not None]
    assert trained == [(torch.float32, torch.float32, True)] * 2
