"""The benches work (no timing is asserted), and what they compare with computes the same loss."""

import json
import sys

import pytest
import torch
from lightning.fabric import Fabric
from rich.console import Console

import attention_transfer as at
from attention_transfer.bench import gradient, loss, parts, speed
from attention_transfer.bench.authors import AuthorsStep
from attention_transfer.methods import METHODS

SMALL = {
    "student": "wrn-10-1",
    "teacher": "wrn-10-1",
    "batch_size": 8,
    "rounds": 1,
    "steps": 1,
    "images": 24,
}
KINDS = ("fp32 channels_last", "bf16 contiguous", "bf16 channels_last")


def test_the_authors_step_and_ours_are_one_computation():
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    theirs = AuthorsStep("wrn-10-1", "wrn-10-2")
    student, teacher = at.create_model("wrn-10-1", 10), at.create_model("wrn-10-2", 10)
    student.load_state_dict({k: v.detach().clone() for k, v in theirs.student.items()})
    teacher.load_state_dict({k: v.detach().clone() for k, v in theirs.teacher.items()})
    transfer = at.Transfer(
        student, teacher, [at.ActivationTransfer(1e3), at.KnowledgeDistillation()], example=x
    )
    optimizer = torch.optim.SGD(
        transfer.trainable_parameters(), 0.1, momentum=0.9, weight_decay=5e-4
    )
    for _ in range(2):
        loss = transfer(x, y).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(theirs(x, y).detach(), loss.detach(), rtol=1e-4, atol=1e-5)
    for name, value in student.named_parameters():
        torch.testing.assert_close(theirs.student[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("bench", "names"),
    [
        (speed.bench_step, ["authors", "student", "teacher", "at", "kd", "at+kd"]),
        (speed.bench_epoch, ["authors", "step", "epoch"]),
        (
            loss.bench_loss,
            [
                "authors",
                *(f"{w} fp32 contiguous" for w in ("ours", "floor")),
                *(f"{w} {k}" for k in KINDS for w in ("authors", "ours", "floor")),
            ],
        ),
        (parts.bench_parts, ["authors", "eager", "eager, contiguous, float32"]),
        (gradient.bench_gradient, [c.name for c in gradient.CASES if not c.compiled]),
    ],
)
def test_benches_write_their_table(tmp_path, monkeypatch, bench, names):
    monkeypatch.setattr(gradient, "peak_memory", lambda case, settings: 1.0)
    file = tmp_path / "bench.json"
    models = (
        dict.fromkeys(("student", "teacher"), "nin-thin-no-bn")
        if bench is gradient.bench_gradient
        else {}
    )
    bench(speed.Settings(**SMALL | models, device="cpu", compile="off"), Console(quiet=True), file)
    found = json.loads(file.read_text())
    assert [r["name"] for r in found["rows"]] == names
    assert found["rows"][0]["times_authors"] == 1
    for row in found["rows"]:
        assert 0 < row["p10"] <= row["median"] <= row["p90"]
    assert found["hardware"]["cores"]


def test_the_authors_loss_and_ours_are_one_computation():
    student, teacher = loss._features(2, torch.float64, torch.channels_last, torch.device("cpu"))
    torch.testing.assert_close(
        loss.authors_loss(student, teacher), at.at_loss(student, teacher), rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("method", ["none", "min-l2", "symmetry", "gradient"])
def test_the_plain_step_and_ours_are_one_computation(method):
    """Its double backward is the yardstick, so it has to do the same work."""
    torch.manual_seed(0)
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    nets = [at.create_model(f"nin-{w}-no-bn", 10) for w in ("thin", "thin", "thin")]
    nets[1].load_state_dict(nets[0].state_dict())
    fabric = Fabric(accelerator="cpu", devices=1)
    gradient.plain_step(method, nets[0], nets[2], x, y, fabric)()
    methods = [] if method == "none" else [METHODS[method]()]
    at.Transfer(nets[1], nets[2], methods, example=x)(x, y).loss.backward()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_memory_is_measured_in_a_process_of_its_own():
    settings = speed.Settings(
        "nin-thin-no-bn", "nin-thin-no-bn", batch_size=16, device="cpu", compile="off"
    )
    alone, twice = (
        gradient.peak_memory(gradient.Case(m, m), settings) for m in ("none", "symmetry")
    )
    assert 0 < alone < twice
