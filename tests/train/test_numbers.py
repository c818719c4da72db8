"""What goes wrong with the numbers of a run is named: step, term, pair and layer."""

from __future__ import annotations

import os

import pytest
import torch
from small_runs import STEPS_PER_EPOCH, carry_out, contents, distilled, rows, small, stop_after
from torch import nn
from toys import Net, batch, make

import attention_transfer as at
from attention_transfer.checks.dead_student import dead_parts
from attention_transfer.errors import RunError, UserError
from attention_transfer.runtime.process import deterministic_algorithms
from attention_transfer.train.gradient_watch import MIN_STEPS, GradientWatch

pytestmark = pytest.mark.usefixtures("quick_runs")


def teach_nan_from(group):
    """From this group on, the teacher outputs NaN."""

    def spoil(trainer):
        module = trainer.module.teacher.get_submodule(group)
        module.register_forward_pre_hook(lambda module, args: args[0] * torch.nan)

    return spoil


def test_a_pair_of_layers_that_is_not_finite(teacher_run, tmp_path, monkeypatch):
    stop_after(monkeypatch, 2, teach_nan_from("group1"))
    words = r"the loss is not finite: first at step 3 in at \(pair group1 ← group1\), kd; the last"
    with pytest.raises(RunError, match=words):
        carry_out(distilled(teacher_run), tmp_path / "run")


@pytest.mark.parametrize("method", ["full", "at+full"])
def test_a_pair_of_each_method(teacher_run, tmp_path, monkeypatch, method):
    stop_after(monkeypatch, 1, teach_nan_from("group2"))
    parts = method.split("+")
    terms = ", ".join(rf"{part} \(pair group2 ← group2\)" for part in parts)
    recipe = distilled(teacher_run, method, beta=dict.fromkeys(parts, 1.0))
    with pytest.raises(RunError, match=f"first at step 2 in {terms};"):
        carry_out(recipe, tmp_path / "run")


def test_a_pair_under_a_compiled_transfer():
    transfer = make(at.ActivationTransfer(1.0))
    transfer.compile(backend="eager")
    transfer(*batch())
    assert [term.ndim for term in transfer.pair_terms["at"]] == [0] * len(transfer.pairs)


@pytest.mark.parametrize("step", [3, 2 * STEPS_PER_EPOCH])  # in the last step, no loss follows
def test_a_gradient_that_is_not_finite(tmp_path, monkeypatch, step):
    def spoil(trainer):
        weight = trainer.module.student.get_submodule("group1.block0.conv0").weight
        weight.register_hook(lambda gradient: gradient * torch.nan)

    stop_after(monkeypatch, step - 1, spoil)
    words = f"the gradient is not finite: first at step {step}, from group1.block0.conv0.weight to"
    with pytest.raises(RunError, match=words):
        carry_out(small(), tmp_path / "run")


def watch_gradients(factor: float, steps: int) -> str | None:
    """What is said of an epoch whose last gradient of one layer is `factor` times the others."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    watch = GradientWatch(model.named_parameters(), torch.device("cpu"))
    for step in range(1, steps + 1):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        if step == steps:
            model[1].weight.grad *= factor
        watch.update()
    text = watch.describe_explosion()
    watch.begin_epoch()
    assert watch.describe_explosion() is None
    return text


def test_an_exploding_gradient():
    text = watch_gradients(1e6, MIN_STEPS)
    assert text is not None and text.startswith(
        "the gradient of 1.weight exploded in one step of the epoch: its norm was 2e+06, "
        "that of the other steps 2; try"
    )
    assert watch_gradients(100, MIN_STEPS) is None
    assert watch_gradients(1e6, MIN_STEPS - 1) is None


def test_a_run_whose_gradient_explodes_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setattr("attention_transfer.train.gradient_watch.MIN_STEPS", STEPS_PER_EPOCH)

    def explode(trainer):
        bias = trainer.module.student.fc.bias
        bias.register_hook(lambda gradient: gradient * 10.0 ** (4 * (trainer.step % 4 == 3)))

    stop_after(monkeypatch, 1, explode)
    said = carry_out(small(clip_norm=1.0), tmp_path / "run")
    assert said.count("warning: the gradient of fc.bias exploded") == 1


class TestDeadStudents:
    def test_a_living_one(self):
        assert dead_parts(make(at.ActivationTransfer(1.0)), batch()[0]) == []

    def test_dead_layers(self):
        transfer = make(at.ActivationTransfer(1.0), student=Net())
        transfer.student.two[0].weight.data.zero_()
        transfer.student.two[0].bias.data.fill_(-1)
        assert dead_parts(transfer, batch()[0]) == [
            "layer two outputs zeros",
            "layer three outputs the same features for every image",
            "its logits are the same for every image",
        ]

    def test_equal_images_say_nothing(self):
        transfer = make(at.ActivationTransfer(1.0))
        assert dead_parts(transfer, torch.ones(4, 3, 8, 8)) == []

    def test_a_run_says_it_once(self, teacher_run, tmp_path, monkeypatch):
        def kill(trainer):
            for parameter in trainer.module.student.fc.parameters():
                parameter.requires_grad_(False).zero_()

        stop_after(monkeypatch, STEPS_PER_EPOCH, kill)
        said = carry_out(distilled(teacher_run), tmp_path / "run")
        words = "warning: the student is dead: its logits are the same for every image; try a lower"
        assert said.count(words) == said.count("is dead") == 1


class TestDeterministic:
    def test_two_runs_are_bit_equal(self, teacher_run, tmp_path, monkeypatch):
        modes = []
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        note = torch.are_deterministic_algorithms_enabled
        stop_after(monkeypatch, 1, lambda trainer: modes.append(note()))
        for name in ("one", "two"):
            carry_out(distilled(teacher_run, deterministic=True), tmp_path / name)
        assert modes == [True, True] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.are_deterministic_algorithms_enabled()
        assert rows(tmp_path / "one") == rows(tmp_path / "two")
        one, two = (contents(tmp_path / name)["student.safetensors"] for name in ("one", "two"))
        assert one == two

    def test_an_operation_without_a_deterministic_form(self):
        words = "--deterministic: put_ has no deterministic form on this device: leave the flag out"
        with pytest.raises(UserError, match=words), deterministic_algorithms(True):
            torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
        with pytest.raises(RuntimeError, match="something else"), deterministic_algorithms(True):
            raise RuntimeError("something else")
