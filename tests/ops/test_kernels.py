"""The kernel of the activation loss: against float64, and the formulas where it does not apply."""

from __future__ import annotations

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from oracles import reference
from torch.autograd import forward_ad
from toys import close, derivative, draw

from attention_transfer import at_loss
from attention_transfer.ops import activation_loss, kernels

DTYPES = [torch.float32, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# One of each; vectors with a rest; rows beyond a run; columns beyond a strip; the fixed widths.
SHAPES = [
    (1, 1, 1, 1),
    (2, 1, 3, 5),
    (3, 67, 7, 7),
    (2, 130, 2, 3),
    (1, 3, 50, 50),
    (2, 16, 3, 3),
    (1, 32, 4, 4),
    (1, 64, 3, 3),
]


@pytest.fixture(scope="module", autouse=True)
def built(tmp_path_factory):
    """The kernel, built here; every size goes to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(kernels, "SMALLEST", 1)
        patch.setattr(kernels, "SMALLEST_MAPS", 1)
        kernels._library.cache_clear()
        if shutil.which(os.environ.get("CXX", "g++")) is None or sys.platform in (
            "darwin",
            "win32",
        ):
            pytest.skip("no C++ compiler")
        assert kernels._library() is not None
        yield
    kernels._library.cache_clear()


@pytest.mark.parametrize("axis", ["space", "channel"])
@pytest.mark.parametrize("p", kernels.EXPONENTS)
@pytest.mark.parametrize("dtype", DTYPES)
class TestValues:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_features(self, shape, layout, dtype, p, axis):
        self.check(draw(*shape).to(dtype, memory_format=layout), p, axis)

    @pytest.mark.parametrize("shape", [(1, 1, 1), (3, 50, 67), (2, 7, 2500)])
    def test_tokens(self, shape, dtype, p, axis):
        self.check(draw(*shape).to(dtype), p, axis)

    @staticmethod
    def check(features, p, axis):
        dims, wide = activation_loss.summed_dims(features, axis), features.double()
        q = kernels.power_sum(features, p, dims)
        exact = (wide.abs() ** p).sum(dims, keepdim=True)
        assert q.dtype == torch.float32
        torch.testing.assert_close(q.double(), exact, rtol=1e-6, atol=0)
        g = draw(*q.shape, seed=1, dtype=torch.float32)
        with torch.no_grad():
            found = kernels.power_grad(features, p, dims, g)
        assert found.dtype == features.dtype and found.stride() == features.stride()
        # To the last bit: products in the formula's order, rounded to bfloat16 as by PyTorch.
        assert torch.equal(
            found, activation_loss.power_grad(features.float(), p, g).to(features.dtype)
        )


class TestMaps:
    """Y = Q / ‖Q‖₂ and its gradient."""

    @pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 64), (5, 2049), (4, 5000)])
    def test_against_float64(self, shape):
        q, g, g_r = (
            draw(*shape).float(),
            draw(*shape, seed=1).float(),
            draw(shape[0], 1, seed=2).float(),
        )
        y, r = kernels.normalize(q)
        exact_r = q.double().norm(dim=1, keepdim=True)
        torch.testing.assert_close(r.double(), exact_r, rtol=1e-6, atol=0)
        torch.testing.assert_close(y.double(), q.double() / exact_r, rtol=1e-6, atol=0)
        with torch.no_grad():
            found = kernels.normalize_backward(y, r, g, g_r)
        wide_y, wide_r, g, g_r = (x.double() for x in (y, r, g, g_r))
        exact = (g - wide_y * ((wide_y * g).sum(1, keepdim=True) - wide_r * g_r)) / wide_r
        torch.testing.assert_close(
            found.double(), exact, rtol=0, atol=2e-6 * exact.abs().max().item()
        )

    def test_rows_of_any_size(self):
        q = draw(6, 70).float()
        q[1], q[2], q[3], q[4], q[5] = (
            0,
            q[2] * 1e-13,
            q[3] * 1e30,
            -q[4].abs() * 1e30,
            float("nan"),
        )
        y, r = kernels.normalize(q)
        exact = q.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
        torch.testing.assert_close(r.double(), exact, rtol=1e-6, atol=0, equal_nan=True)
        torch.testing.assert_close(
            y.double(), q.double() / exact, rtol=1e-6, atol=1e-37, equal_nan=True
        )
        g, zero = torch.ones_like(q), torch.zeros_like(r)
        with torch.no_grad():
            slope = kernels.normalize_backward(y, r, g, zero)
        assert (slope[1:3] == 1e12).all()  # at the bound, without the projection

    def test_what_it_does_not_take(self):
        q, one = draw(4, 6).float(), torch.ones(4, 1)
        y, r = kernels.normalize(q)
        for other in (q.double(), q.bfloat16(), q.t(), q[:, ::2], q.view(2, 2, 6), q.to("meta")):
            assert kernels.normalize(other) is None
        assert kernels.normalize_backward(y, r, q, one) is None  # to be differentiated
        with torch.no_grad():
            assert kernels.normalize_backward(y, r, q.double(), one) is None
            expanded = kernels.normalize_backward(
                y, r, one.expand(4, 6), one
            )  # as of a sum: one number
            assert torch.equal(expanded, kernels.normalize_backward(y, r, torch.ones(4, 6), one))


class TestLoss:
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)]
    )
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("p", kernels.EXPONENTS)
    @pytest.mark.parametrize("axis", ["space", "channel"])
    def test_against_float64(self, axis, p, layout, dtype, tolerance):
        student, teacher = (
            draw(3, 33, 6, 5, seed=s).to(dtype, memory_format=layout) for s in (0, 1)
        )
        student[1] = 0
        s, t = student.double().numpy(), teacher.double().numpy()
        student.requires_grad_(), teacher.requires_grad_()
        loss = at_loss(student, teacher, p=p, axis=axis)
        assert loss.item() == pytest.approx(reference.at_loss(s, t, p=p, axis=axis), rel=2e-6)
        found = torch.autograd.grad(loss, (student, teacher))
        for ours, (a, b) in zip(found, ((s, t), (t, s)), strict=True):
            exact = reference.at_loss_gradient(a, b, p=p, axis=axis)
            assert (
                np.abs(ours.double().numpy() - exact)[[0, 2]].max()
                <= tolerance * np.abs(exact[[0, 2]]).max()
            )
        assert (found[0][1] == 0).all()

    @pytest.mark.parametrize("p", kernels.EXPONENTS)
    def test_second_derivatives_and_tangents(self, p):
        student, teacher, v = (draw(2, 9, 3, 3, seed=s, dtype=torch.float32) for s in range(3))

        def all_of(student, v):
            a = student.clone().requires_grad_()
            first = derivative(at_loss(a, teacher, p=p), a, create_graph=True)
            second = derivative((first * v).sum(), a)
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(student.clone().requires_grad_(), v)
                loss = at_loss(dual, teacher, p=p)
                over = forward_ad.unpack_dual(derivative(loss, dual)).tangent
                return first.detach(), second, over, forward_ad.unpack_dual(loss).tangent.detach()

        for ours, exact in zip(
            all_of(student, v), all_of(student.double(), v.double()), strict=True
        ):
            torch.testing.assert_close(
                ours.double(), exact.double(), rtol=1e-4, atol=1e-6 * exact.abs().max().item()
            )

    def test_only_the_features_are_kept(self):
        student = draw(2, 64, 4, 4, dtype=torch.bfloat16).requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            at_loss(student, student.detach().neg())
        assert all(t.numel() <= 2 * 16 for t in kept if t.data_ptr() != student.data_ptr())

    def test_equal_features_have_equal_maps(self):
        a = draw(2, 33, 7, 7, dtype=torch.bfloat16)
        assert at_loss(a.clone().requires_grad_(), a) == 0

    def test_infinite_and_undefined_values_stay_so(self):
        a = torch.tensor([1.0, float("inf"), float("nan"), 3.3e38, -0.0]).view(1, 1, 1, 5)
        for features in (a, a.bfloat16()):
            q = kernels.power_sum(features, 2, (1,)).flatten()
            assert q[0] == 1 and q[1] == q[3] == float("inf") and q[2].isnan() and q[4] == 0
            with torch.no_grad():
                slope = kernels.power_grad(features, 2, (1,), torch.ones(1, 1, 1, 5)).flatten()
            assert (
                slope[0] == 2
                and slope[1] == slope[3] == float("inf")
                and slope[2].isnan()
                and slope[4] == 0
            )

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_threads_do_not_share(self, dtype):
        pairs = [[draw(4, 32, 16, 16, seed=2 * i + j).to(dtype) for j in (0, 1)] for i in range(8)]

        def both(pair):
            student = pair[0].clone().requires_grad_()
            loss = at_loss(student, pair[1])
            return loss.detach(), derivative(loss, student)

        alone = [both(pair) for pair in pairs]
        with ThreadPoolExecutor(4) as pool:
            for found, expected in zip(pool.map(both, pairs * 5), alone * 5, strict=True):
                assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


class TestElsewhere:
    """Nothing but plain dense tensors comes to the kernel."""

    def test_what_it_does_not_take(self):
        a = draw(2, 6, 4, 4, dtype=torch.float32)
        assert kernels.power_sum(a, 2, (1,)) is not None
        lazy = torch.complex(a, a).conj().imag
        assert lazy.is_neg()
        zeros = torch._efficientzerotensor((2, 6, 4, 4))
        for other in (
            a.double(),
            a.half(),
            a[:, ::2],
            a[..., 1:3],
            a[:1].expand(2, 6, 4, 4),
            lazy,
            zeros,
            a.to("meta"),
        ):
            assert kernels.power_sum(other, 2, (1,)) is None
        for p in (1.5, 3, 6):
            assert kernels.power_sum(a, p, (1,)) is None
        g = torch.ones(2, 1, 4, 4)
        assert kernels.power_grad(a, 2, (1,), g) is None  # to be differentiated
        with torch.no_grad():
            assert kernels.power_grad(a, 2, (1,), g) is not None
            assert kernels.power_grad(a, 2, (1,), g.double()) is None

    def test_a_traced_or_transformed_tensor(self):
        from torch._subclasses import FakeTensorMode
        from torch.utils.flop_counter import FlopCounterMode

        a = draw(2, 6, 4, 4, dtype=torch.float32)
        with FlopCounterMode(display=False):
            assert kernels.power_sum(a, 2, (1,)) is None
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(a)
            assert kernels.power_sum(fake, 2, (1,)) is None
            assert at_loss(fake, fake).shape == ()
        assert torch.func.grad(lambda a: at_loss(a, 2 * a.flip(0)))(a).isfinite().all()
        found = []
        torch.func.vmap(lambda a: found.append(kernels.power_sum(a, 2, (1,))) or a)(a[None])
        assert found == [None]

    def test_a_slice_and_an_expanded_gradient(self):
        whole, teacher = (
            draw(2, 6, 4, 5, dtype=torch.float32),
            draw(2, 3, 4, 4, seed=1, dtype=torch.float32),
        )
        part = whole[:, ::2, :, 1:].requires_grad_()
        copy = part.detach().contiguous().requires_grad_()
        torch.testing.assert_close(
            derivative(at_loss(part, teacher), part), derivative(at_loss(copy, teacher), copy)
        )
        q = activation_loss.PowerSum.apply(copy, 2, "space")
        close(derivative(q.sum(), copy), 2 * copy.detach())  # g is one number, expanded

    @pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "'"])
    def test_without_a_compiler(self, compiler, monkeypatch, tmp_path):
        student, teacher = (
            draw(2, 6, 4, 4, dtype=torch.float32),
            draw(2, 6, 4, 4, seed=1, dtype=torch.float32),
        )
        expected = at_loss(student, teacher)
        monkeypatch.setenv("CXX", compiler)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(kernels, "_library", kernels._library.__wrapped__)
        assert kernels._library() is None and not list(tmp_path.rglob("*.so"))
        torch.testing.assert_close(at_loss(student, teacher), expected)

    def test_a_small_tensor_calls_no_compiler(self, monkeypatch):
        monkeypatch.setattr(kernels, "SMALLEST", 1 << 16)
        monkeypatch.setattr(kernels, "SMALLEST_MAPS", 1 << 11)
        monkeypatch.setattr(kernels, "_library", lambda: pytest.fail("compiled"))
        at_loss(draw(2, 6, 4, 4, dtype=torch.float32), draw(2, 6, 4, 4, dtype=torch.float32))


def test_the_device_of_new_tensors_is_not_the_features():
    features = draw(2, 3, 4, 4).float()
    expected = kernels.power_sum(features, 2, (1,))
    with torch.device("meta"):
        assert torch.equal(kernels.power_sum(features, 2, (1,)), expected)
