"""Preflight is silent on a sound transfer, leaves no trace, and stops a run with an error."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
import torch
from preflight_toys import (
    KnowingTeacher,
    Noisy,
    assert_only,
    findings_of,
    labelled_batches,
    make_at_kd,
)
from small_runs import carry_out, contents, distilled, request_stop, rows, stop_after
from torch import nn
from toys import CLASSES, Net, assert_same, batch, count_hooks, make

import attention_transfer as at
from attention_transfer.checks.findings import Finding
from attention_transfer.checks.preflight import preflight
from attention_transfer.methods.registry import METHODS
from attention_transfer.train.signals import Interrupted


class TestASoundTransfer:
    @pytest.mark.parametrize(
        "names", [[], *([n] for n in METHODS), ["at", "kd"], list(METHODS)], ids="+".join
    )
    def test_nothing_is_found(self, names):
        transfer = make(*(METHODS[n]() for n in names)) if names else at.Transfer(Net())
        assert preflight(transfer, *batch(8)) == []

    def test_second_derivatives(self):
        transfer = make(at.GradientTransfer(), at.GradientSymmetry(), at.GradientNorm())
        assert preflight(transfer, *batch(8)) == []

    @pytest.mark.parametrize("decay", ["linear", "cosine", "step", "warm-up", "warm-up+linear"])
    def test_schedules(self, decay):
        transfer = make(
            at.ActivationTransfer(decay=decay), at.KnowledgeDistillation(decay="linear")
        )
        assert preflight(transfer, *batch(8)) == []

    def test_networks_of_the_package(self):
        student, teacher = at.create_model("wrn-10-1", 10), at.create_model("wrn-16-1", 10)
        x, y = batch(8, size=32)
        transfer = at.Transfer(
            student, teacher, [at.ActivationTransfer(), at.KnowledgeDistillation()], example=x
        )
        assert preflight(transfer.train(), x, y) == []

    def test_a_good_teacher(self):
        transfer = make(at.KnowledgeDistillation(), teacher=KnowingTeacher(400, 9))
        assert findings_of(transfer, images=labelled_batches(400), teacher_accuracy=0.9) == {
            "error": [],
            "warning": [],
            "note": [],
        }

    def test_it_is_public(self):
        assert at.preflight is preflight


class TestNothingIsChanged:
    @pytest.mark.filterwarnings("ignore:the student uses statistics of the batch in 1 layer")
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("gradient", [True, False])
    def test_bit_for_bit(self, training, gradient):
        methods = (
            [METHODS[n]() for n in METHODS] if gradient else [at.ActivationTransfer(decay="linear")]
        )
        transfer = make(*methods, student=Noisy(), teacher=Noisy(seed=1)).train(training)
        transfer.student.drop.eval()
        transfer.teacher.norm.train()  # a user's mistake, which preflight must not repair
        x, y = batch(8)
        for parameter in transfer.parameters():
            parameter.grad = torch.ones_like(parameter)

        def state():
            networks = (transfer, transfer.teacher)
            return (
                [{k: v.clone() for k, v in m.state_dict().items()} for m in networks],
                [[s.training for s in m.modules()] for m in networks],
                [p.requires_grad for m in networks for p in m.parameters()],
                [(p.grad.data_ptr(), p.grad.sum()) for p in transfer.parameters()],
                [count_hooks(m) for m in networks],
                [b.data_ptr() for m in networks for b in m.buffers()],
                {k: v for k, v in vars(transfer).items() if isinstance(v, (bool, str, int))},
                (random.getstate(), x.requires_grad, x.clone()),
                (
                    np.random.get_state()[1].tolist(),
                    np.random.get_state()[2],
                    torch.get_rng_state().tolist(),
                ),
            )

        before = state()
        preflight(transfer, x, y, images=[batch(8)])
        after = state()
        for a, b in zip(before[0], after[0], strict=True):
            assert_same(a, b, rtol=0, atol=0)
        assert before[1:7] == after[1:7]
        assert before[7][:2] == after[7][:2] and torch.equal(before[7][2], after[7][2])
        assert before[8] == after[8]

    def test_the_next_step_is_the_same(self):
        x, y = batch(8)

        def step(checked):
            torch.manual_seed(0), random.seed(0), np.random.seed(0)
            transfer = make_at_kd(student=Noisy()).train()
            if checked:
                preflight(transfer, x, y)
            out = transfer(x, y, 0.0)
            out.loss.backward()
            return {n: p.grad for n, p in transfer.student.named_parameters()} | {
                "loss": out.loss.detach()
            }

        assert_same(step(True), step(False), rtol=0, atol=0)

    def test_when_the_networks_fail(self):
        transfer = make_at_kd(student=Noisy()).train()
        transfer.student.fc = nn.Linear(3, CLASSES)
        hooks, calls = count_hooks(transfer.student), transfer.student.calls.clone()
        with pytest.raises(RuntimeError):
            preflight(transfer, *batch(8))
        assert count_hooks(transfer.student) == hooks and transfer.student.training
        assert transfer.student.calls == calls

    def test_without_gradients_around_it(self):
        with torch.no_grad():
            assert preflight(make_at_kd(), *batch(8)) == []
            assert not torch.is_grad_enabled()

    def test_a_compiled_transfer_is_not_compiled_for_it(self):
        transfer, ran = make_at_kd(), []

        def backend(graph, inputs):
            ran.append(graph)
            return graph.forward

        transfer.compile(backend=backend)
        assert preflight(transfer, *batch(8)) == [] and not ran
        transfer(*batch(8))
        assert ran
        assert preflight(torch.compile(make_at_kd(), backend=backend), *batch(8)) == []

    def test_a_closed_transfer(self):
        transfer = make_at_kd()
        transfer.close()
        assert_only("error", "was not called", findings_of(transfer))


class TestArguments:
    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"x": torch.zeros(8, 3, 8, 8, dtype=torch.uint8)}, "expected floating-point images"),
            ({"x": torch.zeros(3, 8, 8)}, "expected floating-point images"),
            ({"y": torch.zeros(8)}, "expected int64 labels"),
            ({"y": torch.zeros(7, dtype=torch.int64)}, r"expected int64 labels \(8,\)"),
            ({"teacher_accuracy": 93.0}, r"expected a share in \[0, 1\]"),
            ({"transfer": Net()}, "expected a Transfer"),
        ],
    )
    def test_wrong_types_and_shapes(self, change, text):
        x, y = batch(8)
        with pytest.raises(at.UserError, match=text):
            preflight(**({"transfer": make_at_kd(), "x": x, "y": y} | change))

    def test_a_finding_is_frozen(self):
        finding = Finding("note", "x")
        with pytest.raises(AttributeError):
            finding.text = "y"


@pytest.mark.usefixtures("quick_runs")
class TestInARun:
    def test_a_sound_teacher_changes_nothing(self, student_run, teacher_run, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "attention_transfer.train.dry_step.preflight", lambda *args, **options: []
        )
        carry_out(distilled(teacher_run), tmp_path / "run")
        assert rows(tmp_path / "run") == rows(student_run)

    def test_findings_are_printed_once(self, teacher_run, tmp_path, monkeypatch):
        """The teacher of two epochs is at chance; a run that continues does not say so again."""
        stop_after(monkeypatch, 5, request_stop)
        heard = []
        monkeypatch.setattr(
            "attention_transfer.train.progress.ProgressBar.say",
            lambda self, text: heard.append(text),
        )
        for expected in (1, 1):
            with pytest.raises(Interrupted):
                carry_out(distilled(teacher_run), tmp_path / "run")
            warnings = [
                text for text in heard if text.startswith("warning: the teacher is right for")
            ]
            assert len(warnings) == expected, heard
            stop_after(monkeypatch, 6, request_stop)

    def test_its_own_accuracy_is_known(self, teacher_run, tmp_path, monkeypatch):
        teacher = tmp_path / "teacher"
        teacher.mkdir()
        for name, data in contents(teacher_run).items():
            (teacher / name).write_bytes(data)
        summary = json.loads((teacher / "summary.json").read_text())
        summary["final"]["val_accuracy"] = 0.875
        (teacher / "summary.json").write_text(json.dumps(summary))
        given = {}
        monkeypatch.setattr(
            "attention_transfer.train.dry_step.preflight",
            lambda *args, **options: given.update(options) or [],
        )
        carry_out(distilled(teacher, epochs=1, max_steps=1), tmp_path / "run")
        assert given["teacher_accuracy"] == 0.875
        x, y = map(torch.cat, zip(*given["images"], strict=True))
        assert x.shape == (100, 3, 32, 32) and x.dtype == torch.float32 and 0.9 < x.max() <= 1
        assert torch.bincount(y).tolist() == [10] * 10

    def test_an_error_ends_the_run_before_a_step(self, teacher_run, command, tmp_path):
        from safetensors import safe_open
        from safetensors.torch import save_file

        dead = tmp_path / "dead"
        dead.mkdir()
        for name, data in contents(teacher_run).items():
            (dead / name).write_bytes(data)
        with safe_open(teacher_run / "student.safetensors", "pt") as file:
            state = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            about = file.metadata()
        state |= {
            k: torch.zeros_like(v)
            for k, v in state.items()
            if k.startswith("group2.") and k.endswith("weight")
        }
        save_file(state, dead / "student.safetensors", about)
        (dead / "summary.json").unlink()  # it has the hash of the weights
        line = (
            "distill --teacher dead --student wrn-10-1 --method at --beta 1 --out run "
            "--limit-train 128 --limit-val 100 --epochs 2 --batch-size 32 --device cpu "
            "--compile off"
        )
        answer = command(line)
        assert answer.status == 2
        assert "the teacher's layer group2 is dead" in answer.err and answer.err.count("\n") == 1
        assert not (tmp_path / "run").exists()  # nothing stands in the way of the next try


def test_the_teacher_is_copied_and_left_alone():
    teacher = Net(8, seed=1)
    before = copy.deepcopy(teacher.state_dict())
    preflight(make_at_kd(teacher=teacher), *batch(8))
    assert_same(dict(teacher.state_dict()), before, rtol=0, atol=0)
