"""Distillation by hand, and the names of methods."""

from __future__ import annotations

import pytest
import torch

import attention_transfer as at
from attention_transfer.methods.options import MethodOptions
from attention_transfer.methods.registry import create_methods, method_names


class TestDistillationLoss:
    def test_by_hand(self):
        s, t = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
        p, q = (t / 3).softmax(1), (s / 3).softmax(1)
        torch.testing.assert_close(
            at.kd_loss(s, t, 3), 9 * (p * (p / q).log()).sum(1).mean(), rtol=1e-12, atol=1e-12
        )

    def test_gradcheck(self):
        s, t = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        assert torch.autograd.gradcheck(lambda s, t: at.kd_loss(s, t, 2.5), (s, t))

    def test_half_precision_logits_are_taken_in_float32(self):
        s, t = torch.randn(2, 6, 4).half(), torch.randn(2, 6, 4).half()
        loss = at.kd_loss(100 * s[0], 100 * t[0])
        assert loss.dtype == torch.float32
        torch.testing.assert_close(
            loss, at.kd_loss(100 * s[0].float(), 100 * t[0].float()), rtol=1e-2, atol=0
        )

    def test_extreme_logits(self):
        s = torch.tensor([[1e4, -1e4], [0.0, 0.0]], requires_grad=True)
        loss = at.kd_loss(s, torch.tensor([[-1e4, 1e4], [0.0, 1.0]]))
        loss.backward()
        assert loss.isfinite() and s.grad.isfinite().all()

    @pytest.mark.parametrize(
        "shapes", [((2, 3), (2, 4)), ((2, 3), (3, 3)), ((3,), (3,)), ((2, 3, 1), (2, 3, 1))]
    )
    def test_shapes(self, shapes):
        with pytest.raises(ValueError, match=r"expected both \(N, K\)"):
            at.kd_loss(*(torch.zeros(s) for s in shapes))

    def test_whole_numbers_are_no_logits(self):
        with pytest.raises(ValueError, match="floating-point"):
            at.kd_loss(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64))


class TestNames:
    def test_expressions(self):
        assert method_names("none") == [] and method_names("at + kd") == ["at", "kd"]
        kd, attention = create_methods(MethodOptions(method="kd+at", alpha=0.5))
        assert isinstance(kd, at.KnowledgeDistillation) and kd.alpha == 0.5
        assert isinstance(attention, at.ActivationTransfer) and attention.decay == "linear"
        assert create_methods(MethodOptions()) == []

    @pytest.mark.parametrize("words", ["att", "at+", "", "at+none", "AT"])
    def test_unknown(self, words):
        with pytest.raises(at.UserError, match="unknown method"):
            method_names(words)

    def test_twice(self):
        with pytest.raises(at.UserError, match="twice"):
            method_names("at+at")
