"""Triton's kernels of the activation loss: on a GPU, and where there is none in Triton's interpreter (conftest.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import derivative, draw

from attention_transfer import at_loss
from attention_transfer.ops import activation_loss, kernels, reference

triton_kernels = pytest.importorskip("attention_transfer.ops.triton_kernels")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One of everything; more positions than a tile, a count beyond one; tokens.
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (2, 150, 3, 3), (1, 5, 20, 15), (3, 10, 20)]
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@pytest.mark.parametrize("axis", ["space", "channel"])
@pytest.mark.parametrize("p", kernels.EXPONENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_sum_and_slope(shape, dtype, p, axis):
    for memory_format in (torch.contiguous_format, torch.channels_last)[: len(shape) - 2]:
        features = draw(*shape).to(dtype, memory_format=memory_format).to(DEVICE)
        features[0] = 0
        removed = activation_loss._removed(features, axis)
        wide = features.double()
        exact = (wide.abs() ** p).sum(removed, keepdim=True)
        layout = triton_kernels.Layout.of(*kernels.as_rows(features, removed))
        q = torch.full(exact.shape, float("nan"), device=DEVICE)
        triton_kernels.power_sum(features, q, layout, p)
        torch.testing.assert_close(q.double(), exact, rtol=1e-6, atol=0)
        g = draw(*q.shape, seed=1).float().to(DEVICE)
        slope = torch.full_like(features, float("nan"))
        triton_kernels.power_grad(features, g, slope, layout, p)
        # To the last bit: the products in the formula's order, rounded as PyTorch rounds; Triton's interpreter cuts
        # bfloat16 off instead.
        tolerance = 2**-7 if (DEVICE, dtype) == ("cpu", torch.bfloat16) else 0
        expected = activation_loss._slope(features.float(), p, g).to(dtype)
        torch.testing.assert_close(slope, expected, rtol=tolerance, atol=0)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", kernels.EXPONENTS)
def test_the_loss_on_a_gpu(p, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "SMALLEST", 1)
    student, teacher = (draw(3, 33, 6, 5, seed=s).to(dtype).cuda() for s in (0, 1))
    assert kernels.power_sum(student, p, (1,)) is not None
    student.requires_grad_()
    loss = at_loss(student, teacher, p=p)
    s, t = (f.detach().double().cpu().numpy() for f in (student, teacher))
    assert loss.item() == pytest.approx(reference.at_loss(s, t, p=p), rel=2e-6)
    found, exact = (
        derivative(loss, student).double().cpu().numpy(),
        reference.at_loss_gradient(s, t, p=p),
    )
    assert (
        np.abs(found - exact).max()
        <= (2e-6 if dtype == torch.float32 else 4e-3) * np.abs(exact).max()
    )
