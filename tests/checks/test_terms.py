"""What preflight finds in the terms of the loss."""

from __future__ import annotations

import pytest
import torch
from preflight_toys import (
    Term,
    assert_only,
    findings_of,
    make_at_kd,
    net_with_constant,
)
from toys import Net, batch, make

import attention_transfer as at
from attention_transfer.checks.preflight import preflight


class TestTerms:
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_not_finite(self, value):
        assert_only(
            "error",
            "the term own is not finite",
            findings_of(make(Term(lambda logits: logits.sum() + value))),
        )

    def test_not_of_the_student(self):
        text = "the term own does not depend on the student"
        assert_only(
            "error", text, findings_of(make(Term(lambda logits: logits.detach().square().sum())))
        )
        assert_only("error", text, findings_of(make(Term(lambda logits: (logits * 0).sum() + 1))))

    def test_one_parameter_is_enough(self):
        """The first of the student, which is the last to be looked at."""
        student = Net()
        student.requires_grad_(False)
        student.one[0].bias.requires_grad_(True)
        findings = findings_of(make(Term(lambda logits: logits.square().sum()), student=student))
        assert not findings["error"] and not findings["warning"]

    def test_a_dead_layer_leaves_no_gradient(self):
        findings = findings_of(
            make(
                at.ActivationTransfer(),
                student=net_with_constant("three", 0.0),
                pairs=[("three", "three")],
            )
        )
        assert any(
            "the term at does not depend on the student" in text for text in findings["error"]
        )

    def test_zero(self):
        assert_only(
            "warning",
            "the term own is 0, so it teaches nothing",
            findings_of(make(Term(lambda logits: (logits - logits).sum()))),
        )

    def test_a_gradient_that_is_not_finite(self):
        assert_only(
            "error",
            "the gradient of the term own is not finite",
            findings_of(make(Term(lambda logits: 1 + (logits * 0).sqrt().sum()))),
        )

    def test_the_same_network(self):
        findings = findings_of(make_at_kd(teacher=Net()))
        assert_only(
            "warning",
            "the same network with the same weights, so at and kd are 0: is it the right teacher?",
            findings,
        )
        teacher = Net()
        teacher.fc.bias.data[0] += 1
        assert (
            "the term at is 0, so it teaches nothing"
            in findings_of(make_at_kd(teacher=teacher))["warning"][0]
        )

    def test_a_weight_of_zero(self):
        assert_only(
            "note",
            "the term at weighs 0 from start to end",
            findings_of(make(at.ActivationTransfer(beta=0.0))),
        )
        assert preflight(make(at.KnowledgeDistillation(alpha=1.0)), *batch(8)) == []

    def test_weights_that_do_not_overlap(self):
        """Each term is looked at where it counts: one broken at the end, one at the start."""

        class Late(Term):
            name = "late"

        early = Term(lambda logits: logits.detach().sum() + 1e3, lambda p: max(0.0, 0.4 - p))
        late = Late(lambda logits: logits.detach().sum() + 1e3, lambda p: max(0.0, p - 0.6))
        assert [text[:14] for text in findings_of(make(early, late))["error"]] == [
            "the term own d",
            "the term late ",
        ]

    def test_classes_that_differ(self):
        teacher = Net(8, seed=1, classes=7)
        findings = findings_of(make_at_kd(teacher=teacher))
        counts = "the student's logits have 5 and the teacher's logits have 7 classes"
        assert_only("error", f"{counts}, and a method compares", findings)
        assert preflight(make(at.ActivationTransfer(), teacher=teacher), *batch(8)) == []
        assert (
            preflight(make(at.GradientTransfer(), teacher=Net(8, seed=1, classes=3)), *batch(8))
            == []
        )

    def test_labels_that_the_student_does_not_have(self):
        x, y = batch(8)
        assert_only(
            "error",
            "the labels go from 0 to 5, but the student's logits have 5 classes",
            findings_of(make_at_kd(), x, y.clamp(max=3) + 2 * (y == 4)),
        )
