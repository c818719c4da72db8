"""Powers and their derivatives at zero; precision."""

from __future__ import annotations

import pytest
import torch
from toys import away, derivative

from attention_transfer.numerics import at_least_float32, power


@pytest.mark.parametrize("p", [1, 1.5, 2, 2.5, 3, 4, 6, 7])
class TestPower:
    def test_value_and_gradients(self, p):
        a = away(3, 5).requires_grad_()
        torch.testing.assert_close(power(a, p), a.abs() ** p, rtol=1e-14, atol=0)
        assert torch.autograd.gradcheck(lambda a: power(a, p), a)
        if p > 1:
            assert torch.autograd.gradgradcheck(lambda a: power(a, p), a)

    def test_derivatives_at_zero(self, p):
        zero = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        first = derivative(power(zero, p).sum(), zero, create_graph=True)
        assert (first == 0).all()
        if p > 1:
            assert (derivative(first.sum(), zero) == (2 if p == 2 else 0)).all()


def test_at_least_float32():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert at_least_float32(torch.ones(2, dtype=dtype)).dtype == torch.float32
    double = torch.ones(2, dtype=torch.float64)
    assert at_least_float32(double) is double
