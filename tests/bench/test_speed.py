"""The benches work (no timing is asserted), and what they compare with computes the same loss."""

import json

import pytest
import torch
from rich.console import Console

import attention_transfer as at
from attention_transfer.bench import speed
from attention_transfer.bench.authors import AuthorsStep

SMALL = {"student": "wrn-10-1", "teacher": "wrn-10-1", "batch_size": 8, "rounds": 1, "steps": 1, "images": 24}


def test_the_authors_step_and_ours_are_one_computation():
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    theirs = AuthorsStep("wrn-10-1", "wrn-10-2")
    student, teacher = at.create_model("wrn-10-1", 10), at.create_model("wrn-10-2", 10)
    student.load_state_dict({k: v.detach().clone() for k, v in theirs.student.items()})
    teacher.load_state_dict({k: v.detach().clone() for k, v in theirs.teacher.items()})
    transfer = at.Transfer(student, teacher, [at.ActivationTransfer(1e3), at.KnowledgeDistillation()], example=x)
    optimizer = torch.optim.SGD(transfer.trainable_parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
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
    ],
)
def test_benches_write_their_table(tmp_path, bench, names):
    file = tmp_path / "bench.json"
    bench(speed.Settings(**SMALL, device="cpu", compile="off"), Console(quiet=True), file)
    found = json.loads(file.read_text())
    assert [r["name"] for r in found["rows"]] == names
    assert found["rows"][0]["times_authors"] == 1
    for row in found["rows"]:
        assert 0 < row["p10"] <= row["median"] <= row["p90"]
    assert found["hardware"]["cores"]
