"""Attention maps, against the float64 oracle, finite differences and numpy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import reference
from torch.autograd import gradcheck, gradgradcheck
from toys import away, close, derivative, draw

from attention_transfer import UserError, at_loss, attention_map, convert_beta
from attention_transfer.map_options import LossOptions
from attention_transfer.maps import map_distance, normalize_map, row_norm

KINDS = ("sum", "max")
EXPONENTS = (1, 1.5, 2, 2.5, 3, 4)
MAPS = list(itertools.product(KINDS, EXPONENTS))


class TestMap:
    @pytest.mark.parametrize(("kind", "p"), MAPS)
    def test_equals_the_oracle(self, kind, p):
        a = draw(3, 5, 4, 6)
        q, y = reference.attention(a.numpy(), kind, p)
        close(attention_map(a, kind, p, normalize=False), q)
        close(attention_map(a, kind, p), y)

    @pytest.mark.parametrize(("kind", "p"), MAPS)
    @pytest.mark.parametrize("normalize", [True, False])
    def test_gradcheck(self, kind, p, normalize):
        a = away(2, 3, 2, 3).requires_grad_()
        assert gradcheck(lambda a: attention_map(a, kind, p, normalize), a)

    @pytest.mark.parametrize(
        ("kind", "p"), [("sum", 1.5), ("sum", 2), ("sum", 3), ("max", 2), ("max", 2.5)]
    )
    def test_gradgradcheck(self, kind, p):
        assert gradgradcheck(lambda a: attention_map(a, kind, p), away(2, 2, 1, 3).requires_grad_())

    @pytest.mark.parametrize("axis", ["space", "channel"])
    @pytest.mark.parametrize("shape", [(2, 3, 2, 2), (2, 4, 3)])
    def test_gradcheck_of_axes_and_tokens(self, axis, shape):
        assert gradcheck(lambda a: attention_map(a, p=3, axis=axis), away(*shape).requires_grad_())

    @pytest.mark.parametrize(("kind", "p"), MAPS)
    def test_an_all_zero_sample_is_zero_with_zero_gradient(self, kind, p):
        a = draw(3, 4, 2, 2)
        a[1] = 0
        a.requires_grad_()
        y = attention_map(a, kind, p)
        assert (y[1] == 0).all() and (y[0] != 0).any()
        first = derivative((y * draw(3, 4, seed=1)).sum(), a, create_graph=True)
        assert (first[1] == 0).all() and first.isfinite().all()
        second = derivative((first * draw(3, 4, 2, 2, seed=2)).sum(), a)
        assert second.isfinite().all()
        assert p == 2 or (second[1] == 0).all()  # Q = ΣA² below the bound: Y'' = 2/1e-12

    @pytest.mark.parametrize(("kind", "p"), MAPS)
    def test_zeros_after_a_relu_have_finite_derivatives(self, kind, p):
        a = draw(2, 4, 3, 3).relu().requires_grad_()
        first = derivative(
            (attention_map(a, kind, p) * draw(2, 9, seed=1)).sum(), a, create_graph=True
        )
        assert (first[a == 0] == 0).all() and first.isfinite().all()
        if p > 1:
            second = derivative((first * draw(2, 4, 3, 3, seed=2)).sum(), a)
            assert second.isfinite().all()
            if p < 2:
                assert (second[a == 0] == 0).all()

    def test_second_derivative_at_zero_is_two_for_squares(self):
        # Q = Σ A²: its second derivative is 2 everywhere, at 0 too.
        a = torch.zeros(1, 2, 1, 2, dtype=torch.float64, requires_grad=True)
        first = derivative(attention_map(a, normalize=False).sum(), a, create_graph=True)
        assert (derivative(first.sum(), a) == 2).all()

    def test_below_the_bound_the_norm_is_the_bound(self):
        a = torch.full((1, 1, 2, 2), 1e-7, dtype=torch.float64, requires_grad=True)
        y = attention_map(a, p=2)
        close(y, torch.full((1, 4), 1e-14 / 1e-12, dtype=torch.float64))
        close(
            derivative(y.sum(), a),
            torch.full((1, 1, 2, 2), 2e-7 / 1e-12, dtype=torch.float64),
            1e-6,
        )

    @pytest.mark.parametrize(("kind", "p"), MAPS)
    def test_one_position(self, kind, p):
        a = draw(2, 3, 1, 1).requires_grad_()
        y = attention_map(a, kind, p)
        close(y, torch.ones(2, 1, dtype=torch.float64))
        close(derivative(y.sum(), a), torch.zeros_like(a))

    @pytest.mark.parametrize(("kind", "p"), MAPS)
    def test_scale_and_channel_order_do_not_matter(self, kind, p):
        a = draw(2, 6, 3, 3)
        expected = attention_map(a, kind, p)
        close(attention_map(-17.5 * a, kind, p), expected)
        close(attention_map(a[:, torch.randperm(6)], kind, p), expected)
        close(attention_map(a.repeat(1, 3, 1, 1), kind, p), expected)

    @pytest.mark.parametrize("p", EXPONENTS)
    def test_signs_do_not_matter(self, p):
        a = draw(2, 3, 4, 4)
        close(attention_map(a, p=p), attention_map(a.abs(), p=p))

    def test_axis_channel_is_over_channels(self):
        a = draw(2, 5, 3, 4)
        q = a.abs().pow(3).sum((2, 3))
        close(attention_map(a, p=3, axis="channel", normalize=False), q)
        close(attention_map(a, p=3, axis="channel"), F.normalize(q, dim=1))
        close(attention_map(a, "max", 3, False, "channel"), a.abs().amax((2, 3)).pow(3))

    def test_tokens_are_reduced_over_their_width(self):
        tokens = draw(2, 12, 5)
        grid = tokens.transpose(1, 2).reshape(2, 5, 3, 4)
        for kind in KINDS:
            close(attention_map(tokens, kind, 3), attention_map(grid, kind, 3))
            close(
                attention_map(tokens, kind, 3, axis="channel"),
                attention_map(grid, kind, 3, axis="channel"),
            )
        assert attention_map(tokens, axis="channel").shape == (2, 5)

    def test_memory_format_does_not_matter(self):
        a = draw(2, 3, 4, 5)
        close(attention_map(a.contiguous(memory_format=torch.channels_last)), attention_map(a))
        close(attention_map(a[:, :, ::2, 1:]), attention_map(a[:, :, ::2, 1:].contiguous()))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(("kind", "p"), MAPS)
    def test_half_precision_is_reduced_in_float32(self, kind, p, dtype):
        # |300|⁴ = 8.1e9 and a sum of 64 channels: float16 ends at 65,504.
        a = (300 * draw(2, 64, 4, 4)).to(dtype)
        y = attention_map(a, kind, p)
        assert y.dtype == torch.float32
        assert attention_map(a, kind, p, normalize=False).isfinite().all()
        close(y.double(), attention_map(a.double(), kind, p), 1e-5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_small_half_precision_values_do_not_vanish(self, dtype):
        a = (1e-4 * draw(2, 8, 4, 4)).to(dtype)
        close(attention_map(a).norm(dim=1), torch.ones(2), 1e-5)

    def test_dtypes_out(self):
        assert attention_map(draw(1, 2, 2, 2, dtype=torch.float32)).dtype == torch.float32
        assert attention_map(draw(1, 2, 2, 2)).dtype == torch.float64

    def test_gradient_comes_back_in_the_dtype_of_the_features(self):
        a = draw(2, 4, 4, 4, dtype=torch.bfloat16).requires_grad_()
        assert derivative((attention_map(a) ** 3).sum(), a).dtype == torch.bfloat16


class TestMapErrors:
    @pytest.mark.parametrize("p", [0.99, 0, -2, math.nan, math.inf, "2", None])
    def test_p(self, p):
        with pytest.raises(ValueError, match="p is .*expected a number ≥ 1"):
            attention_map(draw(1, 2, 2, 2), p=p)

    def test_names_point_to_the_nearest(self):
        with pytest.raises(
            ValueError,
            match="kind is 'summ': expected one of sum, max, attention; did you mean sum",
        ):
            attention_map(draw(1, 2, 2, 2), kind="summ")
        with pytest.raises(ValueError, match="did you mean channel"):
            attention_map(draw(1, 2, 2, 2), axis="channels")

    @pytest.mark.parametrize("shape", [(3,), (3, 4), (1, 2, 3, 4, 5)])
    def test_shape(self, shape):
        with pytest.raises(ValueError, match=r"got shape .*expected \(N, C, H, W\) or \(N, L, D\)"):
            attention_map(torch.ones(shape))

    @pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 0, 3, 3), (2, 3, 0, 3)])
    def test_empty(self, shape):
        with pytest.raises(ValueError, match="empty"):
            attention_map(torch.ones(shape))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
    def test_dtype(self, dtype):
        with pytest.raises(ValueError, match="expected a floating-point tensor"):
            attention_map(torch.ones(1, 2, 2, 2, dtype=dtype))

    def test_no_tensor(self):
        with pytest.raises(ValueError, match="of type ndarray: expected a tensor"):
            attention_map(np.ones((1, 2, 2, 2)))


class TestNorms:
    @pytest.mark.parametrize("order", [1, 1.5, 2, 3, math.inf])
    def test_equals_numpy(self, order):
        d = draw(4, 7)
        close(row_norm(d, order), np.linalg.norm(d.numpy(), ord=order, axis=1))
        s, t = draw(3, 2, 3, 3), draw(3, 2, 3, 3, seed=1)
        y = reference.attention(s.numpy())[1] - reference.attention(t.numpy())[1]
        expected = np.linalg.norm(y, ord=order, axis=1).mean() / 2
        assert at_loss(s, t, convention="paper", norm=order).item() == pytest.approx(
            expected, rel=1e-10
        )

    @pytest.mark.parametrize("order", [1, 1.5, 2, 3])
    def test_gradcheck(self, order):
        assert gradcheck(lambda d: row_norm(d, order), away(2, 4).requires_grad_())

    @pytest.mark.parametrize("order", [1, 1.5, 2, 3, math.inf])
    def test_gradient_at_zero_is_zero(self, order):
        d = draw(3, 4)
        d[1] = 0
        d.requires_grad_()
        first = derivative(row_norm(d, order).sum(), d, create_graph=True)
        assert (first[1] == 0).all() and first.isfinite().all() and (first[0] != 0).any()
        if first.requires_grad:
            assert derivative((first * draw(3, 4, seed=1)).sum(), d).isfinite().all()

    @pytest.mark.parametrize("convention", ["authors", "caffe"])
    def test_the_order_matters_to_paper_alone(self, convention):
        a, b = draw(2, 4), draw(2, 4, seed=1)
        losses = [
            map_distance(a, b, LossOptions(convention=convention, norm=order)) for order in (1, 2)
        ]
        assert losses[0] == losses[1]

    @pytest.mark.parametrize("norm", [0.5, 0, -1, math.nan, "2"])
    def test_wrong_order(self, norm):
        with pytest.raises(ValueError, match="norm is .*expected a number ≥ 1"):
            at_loss(draw(1, 1, 2, 2), draw(1, 1, 2, 2), convention="paper", norm=norm)

    def test_a_map_is_not_changed_by_a_second_normalisation(self):
        y = normalize_map(draw(3, 5).abs())
        close(normalize_map(y), y)


class TestBeta:
    @pytest.mark.parametrize(("size", "beta"), [(32, 1.953125), (16, 7.8125), (8, 31.25)])
    def test_published_numbers(self, size, beta):
        assert convert_beta(1000, "authors", "caffe", size * size) == beta
        assert convert_beta(beta, "caffe", "authors", size * size) == 1000

    @pytest.mark.parametrize(
        ("source", "target"), [("authors", "caffe"), ("caffe", "authors"), ("paper", "paper")]
    )
    def test_the_loss_stays_the_same(self, source, target):
        s, t = draw(2, 3, 5, 7), draw(2, 3, 5, 7, seed=1)
        before = 10 * at_loss(s, t, convention=source)
        after = convert_beta(10, source, target, 35) * at_loss(s, t, convention=target)
        close(after, before)

    @pytest.mark.parametrize(("source", "target"), [("authors", "paper"), ("paper", "caffe")])
    def test_paper_is_no_multiple(self, source, target):
        with pytest.raises(UserError, match="'paper'"):
            convert_beta(1000, source, target, 64)

    def test_unknown(self):
        with pytest.raises(UserError, match="did you mean caffe"):
            convert_beta(1000, "authors", "cafe", 64)
