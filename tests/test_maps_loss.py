"""The loss over pairs of layers: conventions, sizes that differ, what pairs and what does not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import reference
from torch.autograd import gradcheck, gradgradcheck
from toys import away, close, derivative, draw

from attention_transfer import at_loss, attention_map

KINDS = ("sum", "max")
CONVENTIONS = ("authors", "paper", "caffe")
RESIZES = ("map", "features", "bilinear")
EXPONENTS = (1, 1.5, 2, 2.5, 3, 4)
LOSSES = list(itertools.product(KINDS, EXPONENTS, CONVENTIONS))


class TestLoss:
    @pytest.mark.parametrize(("kind", "p", "convention"), LOSSES)
    def test_value_and_gradient_equal_the_oracle(self, kind, p, convention):
        student, teacher = draw(3, 4, 3, 5).requires_grad_(), draw(3, 7, 3, 5, seed=1)
        s, t = student.detach().numpy(), teacher.numpy()
        loss = at_loss(student, teacher, kind=kind, p=p, convention=convention)
        assert loss.shape == () and loss.dtype == torch.float64
        assert loss.item() == pytest.approx(reference.at_loss(s, t, kind, p, convention), rel=1e-10)
        close(derivative(loss, student), reference.at_loss_gradient(s, t, kind, p, convention))

    @pytest.mark.parametrize(("kind", "p", "convention"), LOSSES)
    def test_gradcheck(self, kind, p, convention):
        teacher = away(2, 2, 2, 2, seed=1)
        student = away(2, 3, 2, 2).requires_grad_()
        assert gradcheck(
            lambda s: at_loss(s, teacher, kind=kind, p=p, convention=convention), student
        )

    @pytest.mark.parametrize("convention", CONVENTIONS)
    def test_gradcheck_of_both_sides(self, convention):
        pair = away(2, 3, 2, 2).requires_grad_(), away(2, 2, 2, 2, seed=1).requires_grad_()
        assert gradcheck(lambda s, t: at_loss(s, t, convention=convention), pair)

    @pytest.mark.parametrize(("p", "convention"), [(2, "authors"), (1.5, "paper"), (3, "caffe")])
    def test_gradgradcheck(self, p, convention):
        teacher, student = away(2, 2, 1, 3, seed=1), away(2, 2, 1, 3).requires_grad_()
        assert gradgradcheck(lambda s: at_loss(s, teacher, p=p, convention=convention), student)

    @pytest.mark.parametrize("resize", RESIZES)
    @pytest.mark.parametrize("sizes", [((4, 4), (2, 2)), ((2, 3), (5, 4)), ((4, 2), (3, 3))])
    def test_gradcheck_of_resizing(self, resize, sizes):
        teacher, student = away(2, 2, *sizes[1], seed=1), away(2, 3, *sizes[0]).requires_grad_()
        assert gradcheck(lambda s: at_loss(s, teacher, resize=resize), student)

    @pytest.mark.parametrize(("kind", "p", "convention"), LOSSES)
    def test_identity_is_zero_with_zero_gradient(self, kind, p, convention):
        student = draw(3, 4, 3, 3)
        student[1] = 0
        teacher = student.clone()
        student.requires_grad_()
        loss = at_loss(student, teacher, kind=kind, p=p, convention=convention)
        first = derivative(loss, student, create_graph=True)
        assert loss.item() == 0
        assert (first == 0).all()
        assert derivative((first * draw(3, 4, 3, 3, seed=3)).sum(), student).isfinite().all()

    @pytest.mark.parametrize(("kind", "p", "convention"), LOSSES)
    def test_an_all_zero_sample_on_either_side_gives_no_nan(self, kind, p, convention):
        student, teacher = draw(4, 3, 2, 2), draw(4, 5, 2, 2, seed=1)
        student[0] = teacher[1] = student[2] = teacher[2] = 0
        student.requires_grad_()
        loss = at_loss(student, teacher, kind=kind, p=p, convention=convention)
        found = derivative(loss, student)
        assert loss.isfinite() and found.isfinite().all()
        assert (found[[0, 2]] == 0).all() and (found[3] != 0).any()
        expected = reference.at_loss(student.detach().numpy(), teacher.numpy(), kind, p, convention)
        assert loss.item() == pytest.approx(expected, rel=1e-10)
        close(
            found,
            reference.at_loss_gradient(
                student.detach().numpy(), teacher.numpy(), kind, p, convention
            ),
        )

    def test_conventions_by_hand(self):
        d = np.array([[0.6, 0.8], [1.0, 0.0]]) - np.array([[0.8, 0.6], [0.0, 1.0]])
        student = torch.tensor([[0.6, 0.8], [1.0, 0.0]], dtype=torch.float64).view(2, 1, 1, 2)
        teacher = torch.tensor([[0.8, 0.6], [0.0, 1.0]], dtype=torch.float64).view(2, 1, 1, 2)
        expected = {
            "authors": (d**2).mean(),
            "caffe": (d**2).sum() / 4,
            "paper": np.sqrt((d**2).sum(1)).mean() / 2,
        }
        for convention, value in expected.items():
            assert at_loss(student, teacher, p=1, convention=convention).item() == pytest.approx(
                value, rel=1e-12
            )

    @pytest.mark.parametrize("size", [32, 16, 8])
    def test_authors_is_two_over_m_times_caffe(self, size):
        s, t = draw(2, 3, size, size), draw(2, 3, size, size, seed=1)
        ratio = at_loss(s, t, convention="authors") / at_loss(s, t, convention="caffe")
        assert ratio.item() == pytest.approx(2 / size**2, rel=1e-12)

    @pytest.mark.parametrize("convention", CONVENTIONS)
    def test_equal_halves_of_a_batch_average_to_the_whole(self, convention):
        """So the loss does not depend on the number of devices."""
        s, t = draw(6, 3, 4, 4), draw(6, 3, 4, 4, seed=1)
        halves = [at_loss(s[i], t[i], convention=convention) for i in (slice(0, 3), slice(3, 6))]
        close(sum(halves) / 2, at_loss(s, t, convention=convention))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype):
        s, t = (
            (200 * draw(2, 64, 4, 4)).to(dtype).requires_grad_(),
            (200 * draw(2, 32, 4, 4, seed=1)).to(dtype),
        )
        loss = at_loss(s, t, p=4)
        loss.backward()
        assert loss.dtype == torch.float32 and s.grad.isfinite().all()
        assert loss.item() == pytest.approx(
            at_loss(s.detach().double(), t.double(), p=4).item(), rel=1e-4
        )

    def test_float32_beside_float64(self):
        s, t = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
        assert at_loss(s.float(), t).item() == pytest.approx(at_loss(s, t).item(), rel=1e-5)

    def test_axis_channel(self):
        s, t = draw(2, 5, 4, 4), draw(2, 5, 2, 6, seed=1)  # the positions need not agree
        d = attention_map(s, axis="channel") - attention_map(t, axis="channel")
        close(at_loss(s, t, axis="channel"), d.square().mean())
        with pytest.raises(
            ValueError, match="channel by channel, .*5 channels and the teacher 6: use axis='space'"
        ):
            at_loss(s, draw(2, 6, 4, 4), axis="channel")


class TestSizes:
    SIZES = [
        ((8, 8), (4, 4)),
        ((4, 4), (8, 8)),
        ((8, 3), (4, 6)),
        ((7, 5), (3, 5)),
        ((5, 5), (1, 1)),
        ((7, 7), (4, 4)),
    ]

    @pytest.mark.parametrize(("hs", "ht"), SIZES)
    def test_map(self, hs, ht):
        s, t, size = (
            draw(2, 3, *hs),
            draw(2, 4, *ht, seed=1),
            (min(hs[0], ht[0]), min(hs[1], ht[1])),
        )
        ys, yt = (
            F.normalize(
                F.adaptive_avg_pool2d(f.square().sum(1, keepdim=True), size).flatten(1), dim=1
            )
            for f in (s, t)
        )
        close(at_loss(s, t), (ys - yt).square().mean())

    @pytest.mark.parametrize(("hs", "ht"), SIZES)
    def test_features(self, hs, ht):
        s, t, size = (
            draw(2, 3, *hs),
            draw(2, 4, *ht, seed=1),
            (min(hs[0], ht[0]), min(hs[1], ht[1])),
        )
        expected = at_loss(F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size))
        close(at_loss(s, t, resize="features"), expected)

    @pytest.mark.parametrize(("hs", "ht"), SIZES)
    def test_bilinear(self, hs, ht):
        s, t, size = (
            draw(2, 3, *hs),
            draw(2, 4, *ht, seed=1),
            (min(hs[0], ht[0]), min(hs[1], ht[1])),
        )
        options = {"mode": "bilinear", "align_corners": False, "antialias": True}
        ys, yt = (
            F.interpolate(f.square().sum(1, keepdim=True), size, **options).flatten(1)
            for f in (s, t)
        )
        close(
            at_loss(s, t, resize="bilinear"),
            (F.normalize(ys, dim=1) - F.normalize(yt, dim=1)).square().mean(),
        )

    @pytest.mark.parametrize("resize", RESIZES)
    def test_equal_sizes_are_left_alone(self, resize):
        s, t = draw(2, 3, 5, 4), draw(2, 4, 5, 4, seed=1)
        assert at_loss(s, t, resize=resize) == at_loss(s, t)

    @pytest.mark.parametrize("resize", RESIZES)
    @pytest.mark.parametrize("convention", CONVENTIONS)
    def test_m_is_the_common_size(self, resize, convention):
        """β's conversion between conventions takes the M of the map that is compared."""
        s, t = draw(2, 3, 8, 6), draw(2, 4, 4, 12, seed=1)
        ratio = at_loss(s, t, resize=resize) / at_loss(s, t, resize=resize, convention="caffe")
        assert ratio.item() == pytest.approx(2 / 24, rel=1e-12)

    @pytest.mark.parametrize("resize", RESIZES)
    def test_tokens_beside_a_feature_map(self, resize):
        tokens, grid = draw(2, 16, 5), draw(2, 3, 8, 8, seed=1)
        as_grid = tokens.transpose(1, 2).reshape(2, 5, 4, 4)
        close(at_loss(grid, tokens, resize=resize), at_loss(grid, as_grid, resize=resize))
        close(at_loss(tokens, grid, resize=resize), at_loss(as_grid, grid, resize=resize))
        fewer = draw(2, 9, 4, seed=2)
        fewer_as_grid = fewer.transpose(1, 2).reshape(2, 4, 3, 3)
        close(at_loss(tokens, fewer, resize=resize), at_loss(as_grid, fewer_as_grid, resize=resize))

    def test_tokens_of_one_length_need_no_grid(self):
        s, t = draw(2, 14, 5), draw(2, 14, 7, seed=1)
        close(at_loss(s, t), (attention_map(s) - attention_map(t)).square().mean())

    def test_tokens_without_a_square_grid_cannot_be_resized(self):
        with pytest.raises(ValueError, match="14 tokens are no square grid"):
            at_loss(draw(2, 14, 5), draw(2, 3, 4, 4))
        with pytest.raises(ValueError, match="14 tokens are no square grid"):
            at_loss(draw(2, 3, 4, 4), draw(2, 14, 5), resize="features")


class TestPairs:
    def test_lists_tuples_and_dicts_sum(self):
        s, t = (
            [draw(2, 3, n, n, seed=n) for n in (8, 4)],
            [draw(2, 5, n, n, seed=n + 1) for n in (8, 4)],
        )
        expected = at_loss(s[0], t[0]) + at_loss(s[1], t[1])
        close(at_loss(s, t), expected)
        close(at_loss(tuple(s), t), expected)
        close(at_loss({"a": s[0], "b": s[1]}, {"b": t[1], "a": t[0]}), expected)

    def test_weights(self):
        s, t = (
            [draw(2, 3, n, n, seed=n) for n in (8, 4)],
            [draw(2, 5, n, n, seed=n + 1) for n in (8, 4)],
        )
        expected = 2 * at_loss(s[0], t[0]) + 0.5 * at_loss(s[1], t[1])
        close(at_loss(s, t, weights=[2, 0.5]), expected)
        named = {"a": s[0], "b": s[1]}, {"a": t[0], "b": t[1]}
        close(at_loss(*named, weights={"b": 0.5, "a": 2}), expected)
        close(at_loss(s[0], t[0], weights=[3]), 3 * at_loss(s[0], t[0]))

    @pytest.mark.parametrize(("students", "teachers"), [(2, 3), (3, 2), (1, 0), (0, 1)])
    def test_unequal_lengths(self, students, teachers):
        a = draw(1, 2, 2, 2)
        with pytest.raises(ValueError, match=f"{students} student features but {teachers}"):
            at_loss([a] * students, [a] * teachers)

    def test_unequal_keys(self):
        a = draw(1, 2, 2, 2)
        with pytest.raises(ValueError, match="expected the same keys"):
            at_loss({"a": a, "b": a}, {"a": a, "c": a})
        with pytest.raises(ValueError, match="expected the same keys"):
            at_loss({"a": a, "b": a}, {"a": a})

    def test_unequal_kinds(self):
        a = draw(2, 2, 2, 2)
        for student, teacher in (([a], a), (a, [a]), ({"a": a}, [a]), ([a], {"a": a}), (a, None)):
            with pytest.raises(
                ValueError, match="expected both a tensor, both a list, or both a dict"
            ):
                at_loss(student, teacher)

    def test_no_pair(self):
        for empty in ([], {}, ()):
            with pytest.raises(ValueError, match="at least one"):
                at_loss(empty, empty)

    @pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], {"a": 1.0, "b": 2.0}, []])
    def test_weights_that_do_not_fit_a_list(self, weights):
        a = draw(1, 2, 2, 2)
        with pytest.raises(ValueError, match="expected a list of 2 numbers"):
            at_loss([a, a], [a, a], weights=weights)

    @pytest.mark.parametrize("weights", [[1.0, 2.0], {"a": 1.0}, {"a": 1.0, "c": 2.0}])
    def test_weights_that_do_not_fit_a_dict(self, weights):
        a = draw(1, 2, 2, 2)
        with pytest.raises(
            ValueError, match="expected a dict with the same keys|expected the same keys"
        ):
            at_loss({"a": a, "b": a}, {"a": a, "b": a}, weights=weights)

    def test_the_pair_at_fault_is_named(self):
        a, b = draw(2, 2, 2, 2), draw(3, 2, 2, 2)
        with pytest.raises(ValueError, match="pair 1: the student's batch is 2, the teacher's 3"):
            at_loss([a, a], [a, b])
        with pytest.raises(ValueError, match="deep"):
            at_loss({"deep": a}, {"deep": b})
        with pytest.raises(ValueError, match="teacher features of pair 1.*int64"):
            at_loss([a, a], [a, a.long()])

    @pytest.mark.parametrize(
        ("option", "value", "nearest"),
        [
            ("convention", "author", "authors"),
            ("resize", "feature", "features"),
            ("kind", "mx", "max"),
        ],
    )
    def test_option_names_point_to_the_nearest(self, option, value, nearest):
        a = draw(1, 2, 2, 2)
        with pytest.raises(
            ValueError, match=f"{option} is {value!r}: expected one of .*did you mean {nearest}"
        ):
            at_loss(a, a, **{option: value})

    @pytest.mark.parametrize("option", [{"kind": ["sum"]}, {"kind": None}, {"p": True}, {"p": "2"}])
    def test_values_of_another_type(self, option):
        a = draw(1, 2, 2, 2)
        at_loss(a, a, p=1)  # True is not taken for this 1
        ((name, _),) = option.items()
        with pytest.raises(ValueError, match=f"{name} is .*: expected"):
            at_loss(a, a, **option)

    @pytest.mark.parametrize(
        "option",
        [
            {"kind": "summ"},
            {"axis": "spaces"},
            {"convention": "author"},
            {"resize": "maps"},
            {"p": 0.5},
            {"norm": 0.5},
        ],
    )
    def test_a_compiled_call_is_refused_too(self, option):
        """Dynamo cannot trace the check of eager mode; what it traces raises."""
        torch.compiler.reset()
        student, teacher = draw(1, 2, 4, 4), draw(1, 2, 2, 2)
        compiled = torch.compile(at_loss, backend="eager")
        kind, text = ValueError, next(iter(option))
        if torch.__version__ < (2, 12):
            # It cannot raise every error of a traced function; its own shows the line that raised.
            kind, text = Exception, f"{text}|raise UserError"
        with pytest.raises(kind, match=text):
            compiled(student, teacher, **option)

    def test_p_below_one(self):
        with pytest.raises(ValueError, match="p is 0.5: expected a number ≥ 1"):
            at_loss(draw(1, 2, 2, 2), draw(1, 2, 2, 2), p=0.5)
