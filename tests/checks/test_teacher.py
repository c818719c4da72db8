"""What preflight finds in the accuracy of the teacher."""

from __future__ import annotations

import pytest
from preflight_toys import (
    KnowingTeacher,
    assert_only,
    findings_of,
    labelled_batches,
)
from torch import nn
from toys import Net, batch, make

import attention_transfer as at
from attention_transfer.checks.teacher import at_least


class TestTeacher:
    def find(self, right, n=400, **options):
        transfer = make(at.KnowledgeDistillation(), teacher=KnowingTeacher(n, right))
        findings = findings_of(transfer, images=labelled_batches(n), **options)
        return findings, transfer.teacher.seen

    def test_near_chance(self):
        findings, _ = self.find(2)
        assert_only("warning", "the teacher is right for 80 of 400 validation images", findings)
        assert "no more than guessing among 5 classes" in findings["warning"][0]

    def test_worse_than_it_was(self):
        findings, _ = self.find(7, teacher_accuracy=0.95)
        assert_only(
            "warning",
            "right for 280 of 400 validation images (70.0%), but was for 95.0% in its own run",
            findings,
        )
        assert "is it the same data and normalisation?" in findings["warning"][0]

    @pytest.mark.parametrize("known", [None, 0.7, 0.74])
    def test_as_good_as_it_was(self, known):
        findings, _ = self.find(7, teacher_accuracy=known)
        assert not any(findings.values())

    def test_it_stops_early(self):
        findings, seen = self.find(10, teacher_accuracy=1.0)
        # The batch, once without and once with the loss; then 25 images are enough.
        assert not any(findings.values()) and seen - 2 * 8 <= 2 + 25 + 8

    def test_at_most_400_images_are_looked_at(self):
        drawn = []

        def endless():
            while True:
                drawn.append(1)
                yield batch(100)

        transfer = make(at.KnowledgeDistillation())
        nn.init.zeros_(transfer.teacher.fc.weight)
        findings = findings_of(transfer, images=endless())
        assert len(drawn) == 4 and "of 400 validation images" in findings["warning"][0]

    def test_few_images(self):
        assert not any(self.find(10, n=2)[0].values())  # too few to tell, and all are right

    def test_other_classes_than_the_student(self):
        transfer = make(at.ActivationTransfer(), teacher=Net(8, seed=1, classes=7))
        assert_only(
            "note",
            "its logits have 7 classes, the student's 5",
            findings_of(transfer, images=labelled_batches(100)),
        )

    def test_the_binomial_tail(self):
        from scipy.stats import binom

        for n, p in ((1, 0.5), (25, 0.1), (400, 0.001), (400, 0.1), (400, 0.95)):
            for k in range(0, n + 1, max(1, n // 13)):
                assert at_least(k, n, p) == pytest.approx(
                    binom.sf(k - 1, n, p), rel=1e-9, abs=1e-200
                )
