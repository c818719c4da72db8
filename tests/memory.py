"""Whether memory stays flat: `make memory`; the tests take fewer steps and transfers."""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from small_runs import _quick, carry_out, distilled, small
from toys import Net, batch, count_hooks, make

import attention_transfer as at
from attention_transfer.train.trainer import Trainer

BATCH, IMAGES = 2, 128
STEPS_PER_EPOCH = IMAGES // BATCH
WARM_UP = 2  # epochs
# What the allocator of the C library may keep of freed memory, in MiB.
SLACK = 32.0


class Memory(NamedTuple):
    """The tensors that live, and the resident memory of this process in MiB."""

    tensors: int
    resident: float

    @classmethod
    def now(cls) -> Memory:
        gc.collect()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        status = Path("/proc/self/status").read_text()
        kilobytes = int(status.partition("VmRSS:")[2].split()[0])
        return cls(tensors, kilobytes / 1024)


def after_transfers(count: int) -> tuple[Memory, Memory, int]:
    """The memory before and after `count` transfers were made, used and dropped, and the hooks."""
    student = Net()

    def use_one() -> None:
        methods = [at.ActivationTransfer(), at.FullActivationTransfer(), at.GradientTransfer()]
        make(*methods, student=student)(*batch()).loss.backward()
        student.zero_grad()

    use_one()
    before = Memory.now()
    for _ in range(count):
        use_one()
    return before, Memory.now(), count_hooks(student)


def after_epochs(epochs: int, teacher: Path, out: Path) -> list[Memory]:
    """The memory at the end of each epoch of a run of `epochs` epochs, 64 steps each."""
    memory = []
    original = Trainer._save

    def save(self: Trainer) -> None:
        original(self)
        memory.append(Memory.now())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_save", save)
        options = {"limit_train": IMAGES, "limit_val": 10, "batch_size": BATCH, "epochs": epochs}
        carry_out(distilled(teacher, "at+kd", ema=0.9, clip_norm=1.0, **options), out)
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--transfers", type=int, default=1000)
    words = parser.parse_args()
    before, after, hooks = after_transfers(words.transfers)
    print(f"{words.transfers} transfers: {before} before, {after} after, {hooks} hooks", flush=True)
    assert not hooks and after.tensors == before.tensors
    assert after.resident < before.resident + SLACK
    with tempfile.TemporaryDirectory() as folder, _quick():
        carry_out(small(), Path(folder, "teacher"))
        epochs = -(-words.steps // STEPS_PER_EPOCH)
        memory = after_epochs(epochs, Path(folder, "teacher"), Path(folder, "run"))
    first, last = memory[WARM_UP], memory[-1]
    print(f"{epochs * STEPS_PER_EPOCH} steps: {first} after epoch {WARM_UP + 1}, {last} at the end")
    assert last.tensors == first.tensors
    assert last.resident < first.resident + SLACK


if __name__ == "__main__":
    main()
