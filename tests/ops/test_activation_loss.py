"""The written backward of the activation loss: by hand, by the oracle, by finite differences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from oracles import reference
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from toys import away, close, derivative, draw

from attention_transfer import at_loss, attention_map
from attention_transfer.maps import normalize_map, row_norm

KINDS = ("sum", "max")
RESIZES = ("map", "features", "bilinear")
EXPONENTS = (1, 1.5, 2, 2.5, 3, 4, 6)
MAPS = list(itertools.product(KINDS, EXPONENTS))
FEW_MAPS = [("sum", 1), ("sum", 1.5), ("sum", 2), ("sum", 3), ("sum", 4), ("max", 1), ("max", 2)]
DISTANCES = [
    ("authors", 2),
    ("caffe", 2),
    ("paper", 1),
    ("paper", 1.5),
    ("paper", 2),
    ("paper", 3),
    ("paper", math.inf),
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]

# One sample of 1×3 positions; rows are channels. Every teacher has Y = (0, 3, 4)/5, all students
# but the last Y = (1, 2, 2)/3, so D = (5, 1, −2)/15. With g = D under `caffe`,
# ⟨Y, g⟩ = (5 + 2 − 4)/45 = 1/15 and g − Y/15 = (14, 1, −8)/45:
# ∂L/∂A = (14, 1, −8)/(45·r) · p·|A|^{p−1}·sign A.
BY_HAND = {
    # Q = (1, 2, 2), r = 3; sign A
    ("sum", 1): (
        [[1, -1, 2], [0, 1, 0]],
        [[0, -3, 1], [0, 0, 3]],
        [[14, -1, -8], [0, 1, 0]],
        45 * 3,
    ),
    # Q = (1+4, 9+1, 1+9) = (5, 10, 10), r = 15; 2A. Teacher: (0, 1+1+1, 4)
    ("sum", 2): (
        [[1, -3, 1], [2, 1, 3]],
        [[0, 1, 2], [0, -1, 0], [0, 1, 0]],
        [[28, -6, -16], [56, 2, -48]],
        45 * 15,
    ),
    # Q = (1+16, 16+1+16+1, 1+16+16+1) = (17, 34, 34), r = 51; 4A³. Teacher: (0, 3·16, 4·16)
    ("sum", 4): (
        [[1, -2, 1], [2, 1, 2], [0, 2, -2], [0, 1, 1]],
        [[0, 2, 2], [0, -2, 2], [0, 2, -2], [0, 0, 2]],
        [[56, -32, -32], [448, 4, -256], [0, 32, 256], [0, 4, -32]],
        45 * 51,
    ),
    # Q = (1, 2, 2), r = 3; sign A at the arg-max
    ("max", 1): (
        [[1, -2, 1], [0, 1, -2]],
        [[0, -3, 1], [0, 2, 4]],
        [[14, -1, 0], [0, 0, 8]],
        45 * 3,
    ),
    # Q = (1, 2, 2), r = 3 from |A| = (1, √2, √2); teacher (0, 3, 4) from (0, √3, 2); 2A at the
    # arg-max
    ("max", 2): (
        [[1, -(2**0.5), 1], [0, 1, -(2**0.5)]],
        [[0, -(3**0.5), 1], [0, 1, 2]],
        [[28, -2 * 2**0.5, 0], [0, 0, 16 * 2**0.5]],
        45 * 3,
    ),
}
# D = (5, 1, −2)/15, N = 1, M = 3.
DISTANCES_BY_HAND = {
    ("authors", 2): 30 / 225 / 3,  # ΣD² = (25 + 1 + 4)/225
    ("caffe", 2): 30 / 225 / 2,
    ("paper", 1): 8 / 15 / 2,
    ("paper", 2): 30**0.5 / 15 / 2,
    ("paper", 3): 134 ** (1 / 3) / 15 / 2,  # 125 + 1 + 8
    ("paper", math.inf): 5 / 15 / 2,
}


def row(channels: list[list[float]]) -> torch.Tensor:
    return torch.tensor(channels, dtype=torch.float64)[None, :, None]


class TestByHand:
    @pytest.mark.parametrize(("kind", "p"), BY_HAND)
    @pytest.mark.parametrize(("convention", "norm"), DISTANCES_BY_HAND)
    def test_value(self, kind, p, convention, norm):
        student, teacher, _, _ = BY_HAND[kind, p]
        expected = DISTANCES_BY_HAND[convention, norm]
        options = {"kind": kind, "p": p, "convention": convention, "norm": norm}
        assert at_loss(row(student), row(teacher), **options).item() == pytest.approx(
            expected, rel=1e-14
        )
        assert reference.at_loss(
            row(student).numpy(), row(teacher).numpy(), **options
        ) == pytest.approx(expected)

    @pytest.mark.parametrize(("kind", "p"), BY_HAND)
    def test_gradient(self, kind, p):
        student, teacher, gradient, divisor = BY_HAND[kind, p]
        a = row(student).requires_grad_()
        found = derivative(at_loss(a, row(teacher), kind=kind, p=p, convention="caffe"), a)
        close(found, row(gradient) / divisor, 1e-14)
        found = reference.at_loss_gradient(
            row(student).numpy(), row(teacher).numpy(), kind, p, "caffe"
        )
        close(torch.from_numpy(found), row(gradient) / divisor, 1e-14)


class TestOracle:
    @pytest.mark.parametrize(("kind", "p"), MAPS)
    @pytest.mark.parametrize(("convention", "norm"), DISTANCES)
    def test_value_and_gradient(self, kind, p, convention, norm):
        student, teacher = draw(3, 4, 3, 5).requires_grad_(), draw(3, 7, 3, 5, seed=1)
        self.check(student, teacher, kind=kind, p=p, convention=convention, norm=norm)

    @pytest.mark.parametrize(("kind", "p"), FEW_MAPS)
    @pytest.mark.parametrize("resize", RESIZES)
    @pytest.mark.parametrize("sizes", [((8, 8), (4, 4)), ((7, 5), (3, 6)), ((2, 9), (5, 4))])
    def test_resized(self, kind, p, resize, sizes):
        student, teacher = draw(2, 3, *sizes[0]).requires_grad_(), draw(2, 4, *sizes[1], seed=1)
        self.check(student, teacher, kind=kind, p=p, resize=resize)

    @pytest.mark.parametrize(("kind", "p"), MAPS)
    def test_axis_channel(self, kind, p):
        student, teacher = draw(2, 5, 4, 3).requires_grad_(), draw(2, 5, 2, 6, seed=1)
        self.check(student, teacher, kind=kind, p=p, axis="channel")

    @pytest.mark.parametrize(("kind", "p"), MAPS)
    @pytest.mark.parametrize("axis", ["space", "channel"])
    def test_tokens(self, kind, p, axis):
        student, teacher = draw(2, 9, 5).requires_grad_(), draw(2, 9, 5, seed=1)
        s, t = (f.detach().transpose(1, 2)[..., None].numpy() for f in (student, teacher))
        loss = at_loss(student, teacher, kind=kind, p=p, axis=axis)
        close(loss, torch.tensor(reference.at_loss(s, t, kind, p, axis=axis), dtype=torch.float64))
        expected = reference.at_loss_gradient(s, t, kind, p, axis=axis)[..., 0].transpose(0, 2, 1)
        close(derivative(loss, student), np.ascontiguousarray(expected))

    @staticmethod
    def check(student, teacher, **options):
        """Eager, and by the formula that `torch.func` and a compiler see."""
        s, t = student.detach().numpy(), teacher.numpy()
        value, gradient = (
            reference.at_loss(s, t, **options),
            reference.at_loss_gradient(s, t, **options),
        )
        loss = at_loss(student, teacher, **options)
        assert loss.item() == pytest.approx(value, rel=1e-10)
        close(derivative(-3 * loss, student), -3 * gradient)
        found, loss = torch.func.grad_and_value(lambda s: at_loss(s, teacher, **options))(
            student.detach()
        )
        assert loss.item() == pytest.approx(value, rel=1e-10)
        close(found, gradient)


class TestDerivatives:
    """Of every kind that autograd takes; at zeros too."""

    @pytest.mark.parametrize(
        ("kind", "p", "convention", "norm"),
        [(*of, "caffe", 2) for of in MAPS] + [("sum", 3, *distance) for distance in DISTANCES],
    )
    def test_gradcheck(self, kind, p, convention, norm):
        student, teacher = away(2, 2, 1, 3).requires_grad_(), away(2, 2, 1, 3, seed=1)

        def loss(s):
            return at_loss(s, teacher, kind=kind, p=p, convention=convention, norm=norm)

        assert gradcheck(loss, student, check_forward_ad=True, check_backward_ad=True)
        assert gradgradcheck(loss, student, check_fwd_over_rev=True)

    @pytest.mark.parametrize("resize", RESIZES)
    def test_gradcheck_resized(self, resize):
        student, teacher = away(2, 2, 4, 3).requires_grad_(), away(2, 2, 2, 3, seed=1)
        assert gradcheck(
            lambda s: at_loss(s, teacher, resize=resize), student, check_forward_ad=True
        )
        assert gradgradcheck(lambda s: at_loss(s, teacher, resize=resize), student)

    @pytest.mark.parametrize("axis", ["space", "channel"])
    @pytest.mark.parametrize("shape", [(2, 3, 2, 2), (2, 3, 4)])
    def test_gradcheck_of_axes_and_tokens(self, axis, shape):
        a = away(*shape).requires_grad_()
        assert gradcheck(lambda a: attention_map(a, p=3, axis=axis), a, check_forward_ad=True)
        assert gradgradcheck(lambda a: attention_map(a, p=3, axis=axis), a, check_fwd_over_rev=True)

    @pytest.mark.parametrize("p", EXPONENTS)
    def test_tangents_are_those_of_the_formula(self, p):
        a, v = away(2, 3, 2, 2), draw(2, 3, 2, 2)

        def f(a):
            return (attention_map(a, p=p) ** 3).sum()

        with forward_ad.dual_level():
            dual = forward_ad.make_dual(a.clone().requires_grad_(), v)
            y = f(dual)
            first, over = (forward_ad.unpack_dual(x).tangent for x in (y, derivative(y, dual)))
        close(first.detach(), torch.func.jvp(f, (a,), (v,))[1])
        close(over, torch.func.jvp(torch.func.grad(f), (a,), (v,))[1])

    @pytest.mark.parametrize(("kind", "p"), MAPS)
    def test_torch_func_of_the_loss(self, kind, p):
        student, teacher = away(2, 2, 1, 3), away(2, 3, 1, 3, seed=1)

        def loss(s):
            return at_loss(s, teacher, kind=kind, p=p)

        def eager_hessian_vector(v):
            leaf = student.clone().requires_grad_()
            return derivative((derivative(loss(leaf), leaf, create_graph=True) * v).sum(), leaf)

        hessian = torch.func.jacfwd(torch.func.jacfwd(loss))(student)
        close(hessian, torch.func.jacrev(torch.func.jacrev(loss))(student))
        v = draw(2, 2, 1, 3, seed=2)
        close(eager_hessian_vector(v), torch.tensordot(hessian, v, dims=4))

    @pytest.mark.parametrize(("kind", "p"), MAPS)
    @pytest.mark.parametrize("mode", ["eager", "formula"])
    def test_at_zeros(self, kind, p, mode):
        """The second derivative at A = 0 is that of |A|^p: 0, but 2 where p = 2."""
        a, teacher = draw(3, 4, 2, 3).relu(), draw(3, 5, 2, 3, seed=1)
        a[1] = 0
        v = draw(3, 4, 2, 3, seed=2)

        def loss(a):
            return at_loss(a, teacher, kind=kind, p=p)

        if mode == "eager":
            leaf = a.clone().requires_grad_()
            first = derivative(loss(leaf), leaf, create_graph=True)
            second = derivative((first * v).sum(), leaf)
        else:
            first = torch.func.grad(loss)(a)
            second = torch.func.grad(lambda a: (torch.func.grad(loss)(a) * v).sum())(a)
        assert first.isfinite().all() and second.isfinite().all() and (second[0] != 0).any()
        assert (first[a == 0] == 0).all() and (first[0] != 0).any()
        if p != 2:
            assert (second[a == 0] == 0).all()
        elif kind == "sum":
            # ∂²L = ∂L/∂Q·2·v there; of the zero sample ∂L/∂Q = g/1e-12, g = −2·Y_T/(N·M).
            y = attention_map(teacher)[1].view(1, 2, 3)
            close(second[1] * 1e-12, -2 * y / 18 * 2 * v[1])


class TestKept:
    """Nothing for backward but the features, the norms (N), and what is N×M."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize(("kind", "p"), FEW_MAPS)
    def test_of_the_loss(self, kind, p, layout, dtype):
        n, c, m = 2, 64, 16
        student = draw(n, c, 4, 4).to(dtype, memory_format=layout).requires_grad_()
        for size, (convention, norm) in itertools.product((4, 2), DISTANCES):
            teacher = draw(n, c, size, size, seed=1).to(dtype, memory_format=layout)
            own, other = self.kept(
                student, teacher, kind=kind, p=p, convention=convention, norm=norm
            )
            assert own == {(student.untyped_storage().data_ptr(), dtype)}
            assert all(t.numel() <= n * m and not t.is_complex() for t in other)
            assert sum(t.numel() * t.itemsize for t in other) <= 7 * n * m * max(4, dtype.itemsize)

    @pytest.mark.parametrize("axis", ["space", "channel"])
    def test_of_tokens(self, axis):
        student = draw(2, 50, 40, dtype=torch.bfloat16).requires_grad_()
        own, other = self.kept(student, student.detach(), p=4, axis=axis)
        assert own == {(student.untyped_storage().data_ptr(), torch.bfloat16)}
        assert all(t.numel() <= 2 * 50 for t in other)

    @staticmethod
    def kept(student, teacher, **options):
        """What shares the features' memory, and the rest, one for each address."""
        own, other, address = set(), {}, student.untyped_storage().data_ptr()

        def pack(t):
            if t.untyped_storage().data_ptr() == address:
                own.add((address, t.dtype))
            else:
                other[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = at_loss(student, teacher, **options)
        assert loss.requires_grad
        return own, list(other.values())


class TestPrecision:
    @pytest.mark.parametrize(
        ("dtype", "tolerance"),
        [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-5)],
    )
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize(("kind", "p"), FEW_MAPS)
    def test_gradient_in_the_dtype_and_layout_of_the_features(
        self, kind, p, layout, dtype, tolerance
    ):
        student = draw(2, 8, 4, 3).to(dtype, memory_format=layout).requires_grad_()
        teacher = draw(2, 5, 4, 3, seed=1).to(dtype)
        loss = 1e3 * at_loss(student, teacher, kind=kind, p=p)
        found = derivative(loss, student)
        assert (
            loss.dtype == torch.float32
            and found.dtype == dtype
            and found.stride() == student.stride()
        )
        expected = 1e3 * reference.at_loss_gradient(
            student.detach().double().numpy(), teacher.double().numpy(), kind, p
        )
        assert np.abs(found.double().numpy() - expected).max() <= tolerance * np.abs(expected).max()

    def test_a_slice_and_an_expanded_tensor(self):
        teacher = draw(4, 5, 3, 2, seed=1)
        whole = draw(4, 6, 3, 5).requires_grad_()
        part = whole[:, ::2, :, 1:3]
        copy = part.detach().clone().requires_grad_()
        for kind in KINDS:
            close(derivative(at_loss(part, teacher, kind=kind), whole)[:, ::2, :, 1:3],
                  derivative(at_loss(copy, teacher, kind=kind), copy))  # fmt: skip
            one = draw(1, 6, 3, 2).requires_grad_()
            assert (
                derivative(at_loss(one.expand(4, 6, 3, 2), teacher, kind=kind), one)
                .isfinite()
                .all()
            )

    @pytest.mark.parametrize("mode", ["eager", "formula", "compiled"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_squares_of_a_large_map_do_not_overflow(self, mode, kind):
        """The square of |6e4|⁴ = 1.3e19 is no float32; there is a zero and a small sample too."""
        torch.compiler.reset()
        student, teacher = (draw(3, 8, 4, 4, seed=s, dtype=torch.float32) for s in (0, 1))
        student *= torch.tensor([6e4, 0.0, 1e-2]).view(3, 1, 1, 1)

        def loss(s):
            return at_loss(s, teacher, kind=kind, p=4)

        if mode == "formula":
            found, value = torch.func.grad_and_value(loss)(student)
        else:
            leaf = student.clone().requires_grad_()
            value = (
                torch.compile(loss, backend="aot_eager", fullgraph=True)
                if mode == "compiled"
                else loss
            )(leaf)
            found = derivative(value, leaf)
        s, t = student.double().numpy(), teacher.double().numpy()
        assert value.item() == pytest.approx(reference.at_loss(s, t, kind, 4), rel=1e-5)
        for ours, exact in zip(found, reference.at_loss_gradient(s, t, kind, 4), strict=True):
            assert np.abs(ours.numpy() - exact).max() <= 1e-5 * np.abs(exact).max()

    def test_normalized_rows_of_any_size_and_sign(self):
        """Zeros, tiny norms, and squares beyond float32, by the Function and by the formula."""
        q, v = draw(5, 6), draw(5, 6, seed=1)
        q[1], q[2], q[3], q[4] = 0, q[2] * 1e-13, q[3] * 1e30, -q[4].abs() * 1e30
        expected = q / q.norm(dim=1, keepdim=True).clamp_min(1e-12)
        for f in (normalize_map, torch.func.vmap(lambda q: normalize_map(q[None])[0])):
            torch.testing.assert_close(f(q.float()).double(), expected, rtol=1e-6, atol=0)
        assert normalize_map(q[:3].bfloat16()).dtype == torch.float32
        with forward_ad.dual_level():
            y, tangent = forward_ad.unpack_dual(normalize_map(forward_ad.make_dual(q, v)))
        close(y, expected)
        exact = torch.func.jvp(normalize_map, (q,), (v,))[1]
        torch.testing.assert_close(tangent, exact, rtol=1e-10, atol=0)
        q.requires_grad_()
        found = []
        for f in (normalize_map, torch.func.vmap(lambda q: normalize_map(q[None])[0])):
            first = derivative((f(q) ** 3).sum(), q, create_graph=True)
            found.append((first, derivative((first * v).sum(), q)))
        for a, b in zip(*found, strict=True):
            for of_a, of_b in zip(a, b, strict=True):
                torch.testing.assert_close(of_a, of_b, rtol=1e-10, atol=0)

    def test_the_slope_of_a_tiny_activation_does_not_overflow(self):
        a = torch.full((1, 1, 1, 1), -1e-40, requires_grad=True)  # |A|^(p−2) = 4e39
        found = derivative(attention_map(a, p=1.01, normalize=False).sum(), a)
        assert found.item() == pytest.approx(-1.01 * 1e-40**0.01, rel=1e-4)

    @pytest.mark.parametrize("order", [2.5, 20, 60])
    def test_a_norm_of_high_order_does_not_underflow(self, order):
        d = (1e-3 * draw(4, 7, dtype=torch.float32)).requires_grad_()
        exact = np.linalg.norm(d.detach().double().numpy(), ord=order, axis=1)
        torch.testing.assert_close(
            row_norm(d, order).double(), torch.from_numpy(exact), rtol=1e-5, atol=0
        )
        share = np.abs(d.detach().double().numpy()) / exact[:, None]
        expected = torch.from_numpy(share ** (order - 1)) * d.detach().sign()
        torch.testing.assert_close(
            derivative(row_norm(d, order).sum(), d).double(), expected, rtol=1e-4, atol=1e-7
        )


class TestCompiled:
    @pytest.mark.parametrize(
        ("kind", "p", "options"),
        [(*of, {}) for of in FEW_MAPS]
        + [
            ("sum", 2, {"resize": "bilinear"}),
            ("max", 1, {"resize": "features"}),
            ("sum", 4, {"axis": "channel"}),
        ]
        + [("sum", 2, {"convention": "paper", "norm": 3})],
    )
    def test_equals_eager(self, kind, p, options):
        torch.compiler.reset()
        student, teacher = draw(2, 3, 4, 4).requires_grad_(), draw(2, 3, 2, 4, seed=1)

        def loss(s, t):
            return at_loss(s, t, kind=kind, p=p, **options)

        expected = loss(student, teacher)
        found = torch.compile(loss, backend="aot_eager", fullgraph=True)(student, teacher)
        close(found, expected)
        close(derivative(found, student), derivative(expected, student))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_gradient_is_made_in_the_layout_of_the_features(self, kind, layout):
        """Made in another one, it would be written twice."""
        torch.compiler.reset()
        student, teacher = (draw(2, 3, 4, 5, seed=s).to(memory_format=layout) for s in (0, 1))
        made = []

        def backend(graph, inputs):
            made.append([n.target for n in graph.graph.nodes if n.op == "call_method"])
            return graph

        torch.compile(lambda s: at_loss(s, teacher, kind=kind), backend=backend, fullgraph=True)(
            student
        )
        assert ("permute" in made[0]) == (layout == torch.channels_last)
        found = torch.func.grad(lambda s: at_loss(s, teacher, kind=kind))(student)
        assert found.stride() == student.stride()

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_batches_of_other_sizes(self, layout):
        """Dynamic shapes: sizes and strides are symbols while the compiler looks."""
        torch.compiler.reset()
        compiled = torch.compile(at_loss, backend="aot_eager", fullgraph=True, dynamic=True)
        for n, size in ((2, 4), (5, 6), (3, 8)):
            student, teacher = (
                draw(n, 3, size, size, seed=s).to(memory_format=layout) for s in (0, 1)
            )
            student.requires_grad_()
            expected, found = at_loss(student, teacher), compiled(student, teacher)
            close(found, expected)
            close(derivative(found, student), derivative(expected, student))
