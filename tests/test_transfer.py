"""Student, teacher, pairs and methods in one module."""

from __future__ import annotations

import copy
import gc
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import CLASSES, Net, batch, count_hooks, make, make_all

import attention_transfer as at
from attention_transfer.methods.base import schedule_factor
from attention_transfer.methods.options import DECAYS
from attention_transfer.methods.registry import METHODS


class TestOutput:
    def test_parts_sum_to_the_loss(self):
        x, y = batch()
        transfer = make_all()
        out = transfer(x, y, progress=0.25)
        assert list(out.parts) == ["ce", *(m.name for m in transfer.methods)]
        torch.testing.assert_close(sum(out.parts.values()), out.loss)
        torch.testing.assert_close(out.logits, transfer.student(x))
        assert out.loss.shape == () and all(p.shape == () for p in out.parts.values())

    def test_terms_are_the_public_functions_times_their_weights(self):
        x, y = batch()
        student, teacher = Net(), Net(8, seed=1)
        out = make(
            at.ActivationTransfer(beta=50, p=4, kind="max"),
            at.KnowledgeDistillation(0.7, 3),
            student=student,
            teacher=teacher,
        )(x, y)
        layers = ["one", "two", "three"]
        (logits, features), (aims, marks) = at.tap(student, layers)(x), at.tap(teacher, layers)(x)
        torch.testing.assert_close(out.parts["ce"], (1 - 0.7) * F.cross_entropy(logits, y))
        torch.testing.assert_close(out.parts["kd"], 0.7 * at.kd_loss(logits, aims, 3))
        torch.testing.assert_close(
            out.parts["at"], 50 * at.at_loss(features, marks, p=4, kind="max")
        )

    @pytest.mark.parametrize("alpha", [0, 0.3, 1])
    def test_distillation_leaves_its_share_to_the_cross_entropy(self, alpha):
        x, y = batch()
        alone = make(at.ActivationTransfer())(x, y).parts["ce"]
        torch.testing.assert_close(
            make(at.KnowledgeDistillation(alpha))(x, y).parts["ce"], (1 - alpha) * alone
        )
        both = make(at.ActivationTransfer(), at.KnowledgeDistillation(alpha))(x, y)
        torch.testing.assert_close(both.parts["ce"], (1 - alpha) * alone)

    def test_no_method_is_training_on_labels_alone(self):
        x, y = batch()
        student = Net()
        transfer = at.Transfer(student)
        out = transfer(x, y)
        assert list(out.parts) == ["ce"] and transfer.teacher is None and transfer.pairs == []
        torch.testing.assert_close(out.loss, F.cross_entropy(student(x), y))

    def test_pairs(self):
        x, y = batch()
        assert make(at.ActivationTransfer()).pairs == [
            ("one", "one"),
            ("two", "two"),
            ("three", "three"),
        ]
        method = at.ActivationTransfer(1000.0)
        chosen = make(method, pairs=[("two", "one"), ("two", "three")])
        _, s = at.tap(chosen.student, ["two"])(x)
        _, t = at.tap(chosen.teacher, ["one", "three"])(x)
        expected = 1000 * at.at_loss([s["two"], s["two"]], [t["one"], t["three"]])
        torch.testing.assert_close(chosen(x, y).parts["at"], expected)
        torch.testing.assert_close(
            make(method, pairs=chosen.pairs, example=None)(x, y).parts["at"],
            expected,
        )

    def test_weights_per_pair(self):
        x, y = batch()
        parts = [
            make(at.ActivationTransfer(weights=w))(x, y).parts["at"]
            for w in ([1, 0, 0], [0, 1, 0], [0, 0, 1], [3, 2, 1], None)
        ]
        torch.testing.assert_close(parts[3], 3 * parts[0] + 2 * parts[1] + parts[2])
        torch.testing.assert_close(parts[4], parts[0] + parts[1] + parts[2])
        with pytest.raises(at.UserError, match="weights has 2 numbers for 3 pairs"):
            make(at.ActivationTransfer(weights=[1, 2]))

    def test_each_network_gets_its_own_view_of_the_batch(self):
        x, y = batch()
        student, teacher = Net(), Net(8, seed=1)
        seen = make(
            at.ActivationTransfer(),
            at.KnowledgeDistillation(),
            student=student,
            teacher=teacher,
            student_transform=lambda x: 2 * x - 1,
            teacher_transform=nn.Sequential(nn.Hardtanh(0.2, 0.8)),
        )(x, y)
        torch.testing.assert_close(seen.logits, student(2 * x - 1))
        expected = 0.9 * at.kd_loss(student(2 * x - 1), teacher(x.clamp(0.2, 0.8)))
        torch.testing.assert_close(seen.parts["kd"], expected)

    def test_a_teacher_that_takes_another_size(self):
        """Its classifier fits 16×16 alone; strides are from each network's own input."""
        teacher = nn.Sequential(
            nn.Conv2d(3, 4, 3, 1, 1),
            nn.Conv2d(4, 4, 3, 2, 1),
            nn.Flatten(),
            nn.Linear(256, CLASSES),
        )
        transfer = make(
            at.ActivationTransfer(),
            teacher=teacher,
            teacher_transform=lambda x: F.interpolate(x, (16, 16)),
        )
        assert transfer.pairs == [("one", "0"), ("two", "1")]
        assert transfer(*batch()).loss.isfinite()

    def test_describe_names_the_effective_weights(self):
        transfer = make(at.ActivationTransfer(beta=1000), example=batch(size=32)[0])
        lines = transfer.methods[0].describe(transfer.pairs, *transfer.features(batch(size=32)[0]))
        assert all(words in lines[0] for words in ("1.9531 (caffe)", "1000 (authors)", "M = 1024"))
        assert "7.8125 (caffe)" in lines[1] and "31.25 (caffe)" in lines[2] and len(lines) == 3


@pytest.mark.parametrize(
    "labels", [torch.arange(4, dtype=torch.int32), torch.arange(2), torch.rand(4, 3)]
)
def test_labels_that_are_none(labels):
    with pytest.raises(ValueError, match=r"labels .* for logits \(4, 5\): expected"):
        make(at.KnowledgeDistillation())(batch()[0], labels)


class TestDecay:
    @pytest.mark.parametrize("tensor", [False, True])
    @pytest.mark.parametrize(
        ("decay", "points"),
        [
            ("constant", {0: 1, 0.5: 1, 1: 1}),
            ("linear", {0: 1, 0.25: 0.75, 1: 0}),
            ("cosine", {0: 1, 0.5: 0.5, 1: 0, 0.25: (1 + math.sqrt(0.5)) / 2}),
            ("step", {0: 1, 0.29: 1, 0.3: 0.2, 0.59: 0.2, 0.6: 0.04, 0.8: 0.008, 1: 0.008}),
        ],
    )
    def test_schedules(self, decay, points, tensor):
        x, y = batch()
        transfer, full = (
            make(at.ActivationTransfer(1000.0, decay=decay)),
            make(at.ActivationTransfer(1000.0))(x, y).parts["at"],
        )
        for progress, factor in points.items():
            given = torch.tensor(float(progress)) if tensor else progress
            assert float(schedule_factor(decay, given)) == pytest.approx(factor, abs=1e-6)
            part = transfer(x, y, progress=given).parts["at"]
            torch.testing.assert_close(part, factor * full, rtol=1e-5, atol=1e-5)
            assert transfer.weights(given)["beta"] == pytest.approx(1000 * factor, abs=1e-3)

    @pytest.mark.parametrize("decay", [d for d in DECAYS if d != "constant"])
    def test_progress_is_asked_for(self, decay):
        with pytest.raises(ValueError, match=re.escape(f"decay='{decay}' needs progress")):
            make(at.ActivationTransfer(decay=decay))(*batch())

    @pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan, math.inf, "0.3"])
    def test_progress_out_of_range(self, progress):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            make(at.ActivationTransfer(decay="linear"))(*batch(), progress=progress)

    def test_a_constant_weight_needs_none(self):
        assert make_all()(*batch()).loss.isfinite()

    def test_distillation_is_not_decayed(self):
        method = at.ActivationTransfer(1000.0, decay="linear")
        transfer = make(method, at.KnowledgeDistillation())
        out = transfer(*batch(), progress=1.0)
        assert out.parts["at"].item() == 0 and out.parts["kd"].item() > 0
        assert transfer.weights(1.0) == {"beta": 0.0, "alpha": 0.9}


class TestTeacher:
    def test_it_is_copied_frozen_and_in_eval_mode(self):
        teacher = at.create_model("wrn-10-1", CLASSES).train()
        student = at.create_model("wrn-10-1", CLASSES).train()
        before, moving = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
        x, y = batch(size=16)
        transfer = make_all(student=student, teacher=teacher, example=x)
        assert all(
            torch.equal(v, moving[k]) for k, v in student.state_dict().items()
        )  # the example left no trace
        assert all(m.training for m in (*teacher.modules(), *student.modules()))
        transfer.train()
        for _ in range(2):
            transfer(x, y).loss.backward()
        transfer.eval().train()
        assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
        assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
        assert all(m.training for m in teacher.modules()) and count_hooks(teacher) == 0
        inside = transfer.teacher
        assert inside is not teacher
        assert not any(m.training for m in inside.modules()) and not any(
            p.requires_grad for p in inside.parameters()
        )
        assert all(torch.equal(v, before[k]) for k, v in inside.state_dict().items())
        assert not torch.equal(
            student.bn.running_mean, moving["bn.running_mean"]
        )  # the student's do move

    def test_it_is_no_part_of_the_module(self):
        student = Net()
        transfer = make(at.ActivationTransfer(1.0), at.GradientTransfer(), student=student)
        assert {id(p) for p in transfer.parameters()} == {id(p) for p in student.parameters()}
        assert [id(p) for p in transfer.trainable_parameters()] == [
            id(p) for p in student.parameters()
        ]
        assert transfer.state_dict().keys() == {f"student.{k}" for k in student.state_dict()}
        assert transfer.teacher not in list(transfer.modules())
        transfer.load_state_dict(make(at.ActivationTransfer(1.0), student=Net(seed=9)).state_dict())
        torch.testing.assert_close(student.fc.weight, Net(seed=9).fc.weight)

    def test_frozen_weights_of_the_student_are_not_trained(self):
        student = Net()
        student.one.requires_grad_(False)
        names = {
            id(p) for p in make(at.ActivationTransfer(), student=student).trainable_parameters()
        }
        assert names == {id(p) for p in student.parameters() if p.requires_grad} and len(names) == 6

    def test_it_moves_with_the_module(self):
        x, y = batch(dtype=torch.float64)
        transfer = make_all().to(torch.float64)
        assert all(p.dtype == torch.float64 for p in transfer.teacher.parameters())
        assert transfer(x, y).loss.dtype == torch.float64
        assert all(p.dtype == torch.bfloat16 for p in transfer.bfloat16().teacher.parameters())
        assert make_all().to("meta").teacher.fc.weight.device.type == "meta"
        kernel = make_all().to(memory_format=torch.channels_last).teacher.two[0].weight
        assert kernel.is_contiguous(memory_format=torch.channels_last)

    def test_its_transform_moves_too(self):
        transfer = make_all(teacher_transform=nn.BatchNorm2d(3, momentum=0.5)).train()
        frozen = transfer._frozen[0].transform
        before = copy.deepcopy(frozen.state_dict())
        transfer(*batch())
        assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())
        assert transfer.double()._frozen[0].transform.weight.dtype == torch.float64
        assert not any("transform" in k for k in transfer.state_dict())

    def test_no_gradient_is_kept_for_it(self):
        x, y = batch()
        out = make(at.ActivationTransfer(1000.0), at.KnowledgeDistillation())(x.requires_grad_(), y)
        out.loss.backward()
        assert x.grad is not None  # the student's share only: the teacher ran without a graph
        student = Net()
        x2 = batch()[0].requires_grad_()
        step = at.tap(student, ["one", "two", "three"])(x2)
        aims = at.tap(Net(8, seed=1), ["one", "two", "three"])(batch()[0])
        loss = 0.1 * F.cross_entropy(step[0], y) + 0.9 * at.kd_loss(step[0], aims[0].detach())
        (loss + 1000 * at.at_loss(step[1], {k: v.detach() for k, v in aims[1].items()})).backward()
        torch.testing.assert_close(x.grad, x2.grad)


class TestStudent:
    def test_a_compiled_or_wrapped_one_is_unwrapped(self):
        student, x = Net(), batch()[0]
        expected = make_all(student=student)(*batch()).loss
        for wrapped in (torch.compile(student, backend="eager"), nn.DataParallel(student)):
            transfer = make_all(student=wrapped)
            assert transfer.student is student
            torch.testing.assert_close(transfer(*batch()).loss, expected)
        student.compile(backend="eager")
        student(x)
        torch.testing.assert_close(make_all(student=student)(*batch()).loss, expected)

    def test_nothing_stays_hooked(self):
        student = Net()
        transfer = make_all(student=student)
        assert count_hooks(student) == 3
        del transfer
        gc.collect()
        assert count_hooks(student) == 0
        transfer = make_all(student=student)
        transfer.compile(backend="eager")
        transfer(*batch())
        del transfer
        gc.collect()
        assert count_hooks(student) == 0
        transfer = make_all(student=student)
        transfer.close()
        assert count_hooks(student) == 0

    def test_two_transfers_on_one_student(self):
        student = Net()
        a, b = (
            make_all(student=student),
            make(at.ActivationTransfer(beta=10), student=student, pairs=[("two", "two")]),
        )
        first = a(*batch()).loss
        second = b(*batch()).loss
        torch.testing.assert_close(a(*batch()).loss, first)
        del a
        gc.collect()
        assert count_hooks(student) == 1
        torch.testing.assert_close(b(*batch()).loss, second)

    def test_its_own_copy_as_teacher(self):
        net = Net()
        assert (
            make(at.ActivationTransfer(), student=net, teacher=net)(*batch()).parts["at"].item()
            == 0
        )

    def test_channels_last(self):
        x, y = batch()
        expected = make_all()(x, y).loss
        last = make_all().to(memory_format=torch.channels_last)
        torch.testing.assert_close(
            last(x.contiguous(memory_format=torch.channels_last), y).loss, expected
        )


class TestErrors:
    @pytest.mark.parametrize("method", [m for m in METHODS.values() if m.needs_teacher])
    def test_a_teacher_is_needed(self, method):
        with pytest.raises(at.UserError, match=f"{method.__name__} needs a teacher"):
            at.Transfer(Net(), None, [method()])

    def test_one_method_twice(self):
        with pytest.raises(at.UserError, match="twice"):
            make(at.ActivationTransfer(), at.ActivationTransfer())

    @pytest.mark.parametrize(("methods", "names"), [([], ""), ([at.GradientNorm()], "'min-l2'")])
    def test_a_teacher_that_no_method_uses(self, methods, names):
        words = re.escape(f"a teacher is given, but methods [{names}] use none: pass teacher=None")
        with pytest.raises(at.UserError, match=words):
            at.Transfer(Net(), Net(), methods)

    def test_words_are_no_methods(self):
        with pytest.raises(at.UserError, match="methods has 'at'"):
            make("at")

    def test_auto_needs_an_example(self):
        with pytest.raises(at.UserError, match="needs example="):
            make(at.ActivationTransfer(), example=None)
        make(at.KnowledgeDistillation(), example=None)

    @pytest.mark.parametrize("pairs", ["all", [("one",)], ["ab"], [("one", "one", "one")]])
    def test_pairs_that_are_none(self, pairs):
        with pytest.raises(at.UserError, match="pairs (is|has) .*expected"):
            make(at.ActivationTransfer(), pairs=pairs)

    @pytest.mark.parametrize("pairs", [[("on", "one")], [("one", "on")]])
    def test_an_unknown_layer(self, pairs):
        with pytest.raises(at.UserError, match="no layer 'on'; did you mean one"):
            make(at.ActivationTransfer(), pairs=pairs)

    def test_features_that_do_not_fit(self):
        with pytest.raises(at.UserError, match="4 channels and the teacher 8"):
            make(at.ActivationTransfer(axis="channel"))
        with pytest.raises(at.UserError, match="got shape"):
            make(at.ActivationTransfer(), pairs=[("fc", "fc")])
        with pytest.raises(at.UserError, match="at least one"):
            make(at.ActivationTransfer(), pairs=[])

    def test_other_classes(self):
        with pytest.raises(at.UserError, match=r"\(4, 5\), teacher_logits \(4, 7\)"):
            make(at.KnowledgeDistillation(), teacher=Net(classes=7))(*batch())

    @pytest.mark.parametrize("beta", [-1, math.nan, math.inf, "1e3", None, True])
    def test_beta(self, beta):
        with pytest.raises(at.UserError, match="beta is .*finite number ≥ 0"):
            at.ActivationTransfer(beta=beta)

    @pytest.mark.parametrize(
        "option", [{"p": 0.5}, {"kind": "mean"}, {"decay": "linaer"}, {"norm": 0}, {"resize": "no"}]
    )
    def test_options_of_attention_transfer(self, option):
        with pytest.raises(ValueError, match="expected"):
            at.ActivationTransfer(**option)

    @pytest.mark.parametrize(
        "option",
        [
            {"alpha": -0.1},
            {"alpha": 1.1},
            {"alpha": "0.9"},
            {"alpha": math.nan},
            {"temperature": 0},
            {"temperature": -1},
            {"temperature": math.inf},
            {"temperature": None},
        ],
    )
    def test_options_of_distillation(self, option):
        with pytest.raises(ValueError, match="expected a number"):
            at.KnowledgeDistillation(**option)
