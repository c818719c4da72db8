"""Full-activation transfer, its learned adapters, and runs of it and of the gradient methods."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small_runs import FLAGS, STEPS_PER_EPOCH, carry_out, rows, small, stop_after, write_factory
from torch import nn
from toys import Net, batch, close, derivative, draw, make

import attention_transfer as at
from attention_transfer.models.network import load_student


def by_hand(s, t):
    """In numpy: flattened over C·H·W and divided by the norm, sample by sample."""
    s, t = (f.reshape(len(f), -1) for f in (s, t))
    d = s / np.linalg.norm(s, axis=1, keepdims=True) - t / np.linalg.norm(t, axis=1, keepdims=True)
    return np.asarray((d**2).sum() / d.size)


class TestLoss:
    def test_numbers_on_paper(self):
        s, t = torch.tensor([[3.0, 4.0], [0.0, 5.0]]), torch.tensor([[4.0, 3.0], [0.0, 1.0]])
        # D = (−0.2, 0.2) in the first sample and 0 in the second: 0.08 over 4 elements.
        for shape in ((2, 1, 1, 2), (2, 2, 1, 1), (2, 1, 2)):
            found = at.full_activation_loss(s.view(shape), t.view(shape))
            assert found.item() == pytest.approx(0.02, rel=1e-6)

    def test_signed_activations(self):
        s, t = draw(3, 4, 5, 6), draw(3, 4, 5, 6, seed=1)
        close(at.full_activation_loss(s, t), by_hand(s.numpy(), t.numpy()), 1e-12)
        assert at.full_activation_loss(s, -s).item() == pytest.approx(
            4 / 120
        )  # unlike a map, it sees the sign
        assert at.full_activation_loss(s, 7 * s).item() == pytest.approx(0, abs=1e-30)
        tokens = s.flatten(2).transpose(1, 2), t.flatten(2).transpose(1, 2)
        close(at.full_activation_loss(*tokens), by_hand(s.numpy(), t.numpy()), 1e-12)

    def test_gradient(self):
        s, t = draw(2, 3, 2, 2).requires_grad_(), draw(2, 3, 2, 2, seed=1)
        assert torch.autograd.gradcheck(lambda s: at.full_activation_loss(s, t), (s,))
        zero = torch.zeros(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
        found = derivative(at.full_activation_loss(zero, torch.zeros_like(t)), zero)
        assert (found == 0).all()

    def test_in_at_least_float32(self):
        s, t = (
            draw(2, 3, 4, 4, dtype=torch.float16) * 1e3,
            draw(2, 3, 4, 4, seed=1, dtype=torch.float16),
        )
        found = at.full_activation_loss(s, t)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, at.full_activation_loss(s.double(), t.double()).float())

    @pytest.mark.parametrize(
        ("s", "t", "words"),
        [
            ((2, 3, 4, 4), (2, 5, 4, 4), "expected the same shape.*FullActivationTransfer learns"),
            ((2, 3, 4, 4), (2, 3, 2, 2), "expected the same shape"),
            ((2, 3), (2, 3), r"expected \(N, C, H, W\) or \(N, L, D\)"),
        ],
    )
    def test_shapes(self, s, t, words):
        with pytest.raises(at.UserError, match=words):
            at.full_activation_loss(torch.zeros(s), torch.zeros(t))

    def test_dtype(self):
        with pytest.raises(at.UserError, match="expected a floating-point tensor"):
            at.full_activation_loss(
                torch.ones(1, 2, 2, 2, dtype=torch.int64), torch.ones(1, 2, 2, 2)
            )


class Mixed(Net):
    """Four channels in the first stage and eight in the others."""

    def __init__(self, seed=0):
        super().__init__(8, seed)
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU())


def adapters(transfer):
    return [*transfer.methods[0].adapters]


def features(model, layers, x):
    return at.tap(model, layers)(x)[1]


class TestAdapters:
    def test_only_where_channels_differ(self):
        kinds = [nn.Identity, nn.Conv2d, nn.Conv2d]
        assert [
            type(a)
            for a in adapters(make(at.FullActivationTransfer(), student=Net(), teacher=Mixed()))
        ] == kinds
        same = make(at.FullActivationTransfer(), student=Net(), teacher=Net(seed=1))
        assert [type(a) for a in adapters(same)] == [nn.Identity] * 3
        assert same.state_dict().keys() == {f"student.{k}" for k in Net().state_dict()}
        wide = make(at.FullActivationTransfer())
        assert [tuple(a.weight.shape) for a in adapters(wide)] == [(8, 4, 1, 1)] * 3
        assert all(a.bias is None for a in adapters(wide))

    def test_value_and_gradients_by_hand(self):
        x, y = batch(dtype=torch.float64)
        student, teacher = Net().double(), Mixed(seed=1).double()
        transfer = make(
            at.FullActivationTransfer(beta=30), student=student, teacher=teacher, example=x
        )
        layers = ["one", "two", "three"]
        s, t = features(student, layers, x), features(teacher, layers, x)
        weights = [None if isinstance(a, nn.Identity) else a.weight for a in adapters(transfer)]
        assert [w is None for w in weights] == [True, False, False]
        expected = 0
        for layer, w in zip(layers, weights, strict=True):
            mapped = (
                s[layer]
                if w is None
                else torch.einsum("oi,nihw->nohw", w[:, :, 0, 0].double(), s[layer])
            )
            expected = expected + by_hand(mapped.detach().numpy(), t[layer].detach().numpy())
        part = transfer(x, y).parts["full"]
        close(part, 30 * expected, 1e-12)
        part.backward()
        w = weights[1].detach().clone().requires_grad_()
        close(
            weights[1].grad,
            derivative(
                30
                * at.full_activation_loss(
                    F.conv2d(s["two"].detach(), w.double()), t["two"].detach()
                ),
                w,
            ),
        )

    def test_they_are_trained_with_the_student(self):
        x, y = batch()
        student = Net()
        transfer = make(at.FullActivationTransfer(), student=student)
        given = {id(p) for p in transfer.trainable_parameters()}
        mine = {id(a.weight) for a in adapters(transfer)}
        assert len(mine) == 3 and given == mine | {id(p) for p in student.parameters()}
        optimiser = torch.optim.SGD(transfer.trainable_parameters(), 0.1)
        before, first = [a.weight.clone() for a in adapters(transfer)], transfer(x, y)
        first.loss.backward()
        assert all(a.weight.grad.abs().sum() > 0 for a in adapters(transfer))
        optimiser.step()
        assert not any(
            torch.equal(a.weight, b) for a, b in zip(adapters(transfer), before, strict=True)
        )

    def test_they_are_saved_with_the_transfer_and_not_with_the_student(self):
        x, y = batch()
        transfer = make(at.FullActivationTransfer())
        with torch.no_grad():
            for a in adapters(transfer):
                a.weight += 0.5
        state = transfer.state_dict()
        extra = {f"methods.0.adapters.{j}.weight" for j in range(3)}
        assert state.keys() == extra | {f"student.{k}" for k in transfer.student.state_dict()}
        assert transfer.student.state_dict().keys() == Net().state_dict().keys()
        other = make(at.FullActivationTransfer(), student=Net(seed=5))
        assert not torch.equal(other(x, y).parts["full"], transfer(x, y).parts["full"])
        other.load_state_dict(state)
        torch.testing.assert_close(
            other(x, y).parts["full"], transfer(x, y).parts["full"], rtol=0, atol=0
        )

    def test_a_new_transfer_makes_new_ones(self):
        method = at.FullActivationTransfer()
        make(method)
        again = make(method, teacher=Net(6, seed=1))
        assert [tuple(a.weight.shape) for a in adapters(again)] == [(6, 4, 1, 1)] * 3

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_networks_of_another_precision(self, dtype):
        """New adapters are float32, whatever the networks, and follow `Transfer.to`."""
        x, y = batch(dtype=dtype)
        student, teacher = Net().to(dtype), Net(8, seed=1).to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        exact = make(at.FullActivationTransfer())(*batch()).parts["full"].to(wide)
        for transfer in (
            make(at.FullActivationTransfer(), student=student, teacher=teacher, example=x),
            make(at.FullActivationTransfer()).to(dtype),
        ):
            part = transfer(x, y).parts["full"]
            part.backward()
            assert part.dtype == wide and all(a.weight.grad is not None for a in adapters(transfer))
            torch.testing.assert_close(part, exact, rtol=0.05, atol=0)

    def test_it_is_refused_without_an_example(self):
        with pytest.raises(
            at.UserError, match="FullActivationTransfer needs example=, a batch of images"
        ):
            make(at.FullActivationTransfer(), example=None, pairs=[("one", "one")])

    def test_features_that_do_not_fit(self):
        with pytest.raises(at.UserError, match=r"student features of fc: got shape \(4, 5\)"):
            make(at.FullActivationTransfer(), pairs=[("fc", "fc")])
        with pytest.raises(at.UserError, match="no pair of layers: expected at least one"):
            make(at.FullActivationTransfer(), pairs=[])

    def test_describe(self):
        transfer = make(at.FullActivationTransfer(beta=7), student=Net(), teacher=Mixed())
        lines = transfer.methods[0].describe(transfer.pairs, *transfer.features(batch()[0]))
        assert lines[0] == "one ← one: (4, 8, 8) and (4, 8, 8), β = 7"
        assert (
            lines[1]
            == "two ← two: (4, 4, 4) and (8, 4, 4), joined by a learned 1×1 convolution, β = 7"
        )


class Tokens(nn.Module):
    """Patches of 2×2 as tokens (N, L, D), with no class token."""

    def __init__(self, width, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.patches, self.block, self.fc = (
                nn.Conv2d(3, width, 2, 2),
                nn.Linear(width, width),
                nn.Linear(width, 5),
            )

    def forward(self, x):
        return self.fc(self.block(self.patches(x).flatten(2).transpose(1, 2)).tanh().mean(1))


class TestSizes:
    def test_they_are_pooled_to_the_smaller(self):
        x, y = batch(dtype=torch.float64)
        student, teacher = Net().double(), Net(seed=1).double()
        options = {"student": student, "teacher": teacher, "example": x}
        for pair in (("one", "two"), ("two", "one")):
            part = make(at.FullActivationTransfer(1), pairs=[pair], **options)(x, y).parts["full"]
            s, t = (
                features(student, [pair[0]], x)[pair[0]],
                features(teacher, [pair[1]], x)[pair[1]],
            )
            s, t = (f if f.shape[-1] == 4 else F.avg_pool2d(f, 2) for f in (s, t))
            close(part, by_hand(s.detach().numpy(), t.detach().numpy()), 1e-12)

    def test_tokens(self):
        x, y = batch(dtype=torch.float64)
        student, teacher = Tokens(6, 0).double(), Tokens(10, 1).double()
        transfer = make(
            at.FullActivationTransfer(1),
            student=student,
            teacher=teacher,
            example=x,
            pairs=[("block", "block")],
        )
        (adapter,) = adapters(transfer)
        s, t = features(student, ["block"], x)["block"], features(teacher, ["block"], x)["block"]
        assert s.shape == (4, 16, 6) and adapter.weight.shape == (10, 6, 1, 1)
        mapped = s @ adapter.weight[:, :, 0, 0].T.double()
        close(
            transfer(x, y).parts["full"],
            by_hand(mapped.detach().numpy(), t.detach().numpy()),
            1e-12,
        )

    def test_tokens_of_a_square_beside_a_feature_map(self):
        x, y = batch(dtype=torch.float64)
        student, teacher = Net().double(), Tokens(4, 1).double()
        pair = {"pairs": [("one", "block")]}
        part = make(
            at.FullActivationTransfer(1), student=student, teacher=teacher, example=x, **pair
        )(x, y).parts["full"]
        s, t = features(student, ["one"], x)["one"], features(teacher, ["block"], x)["block"]
        grid = t.transpose(1, 2).unflatten(2, (4, 4))
        close(part, by_hand(F.avg_pool2d(s, 2).detach().numpy(), grid.detach().numpy()), 1e-12)

    def test_tokens_that_are_no_square(self):
        """The example tells their grid; without one they fit others of their number alone."""
        x, y = torch.rand(2, 3, 8, 6, dtype=torch.float64), torch.tensor([0, 1])
        student, teacher = Net().double(), Tokens(4, 1).double()
        pair = {"pairs": [("one", "block")], "example": x}
        part = make(at.FullActivationTransfer(1), student=student, teacher=teacher, **pair)(
            x, y
        ).parts["full"]
        s, t = (
            features(student, ["one"], x)["one"],
            teacher.block(teacher.patches(x).flatten(2).transpose(1, 2)),
        )
        grid = t.transpose(1, 2).unflatten(2, (4, 3))
        close(part, by_hand(F.avg_pool2d(s, 2).detach().numpy(), grid.detach().numpy()), 1e-12)
        method, names = at.FullActivationTransfer(), [("one", "block")]
        method.prepare(names, [torch.rand(2, 12, 6)], [torch.rand(2, 12, 4)])
        with pytest.raises(at.UserError, match="pair 0: 12 tokens are no square grid"):
            method.prepare(names, [torch.rand(2, 4, 8, 6)], [torch.rand(2, 12, 4)])


class Killed(BaseException):
    """As if the process were gone."""


@pytest.mark.usefixtures("quick_runs")
class TestRuns:
    def test_full_killed_and_continued(self, teacher_run, tmp_path, monkeypatch):
        """Bit for bit, the adapters among it; and the student that is left has none."""
        student = write_factory(tmp_path)
        recipe = small(
            command="distill", teacher=str(teacher_run), model=student, method="full", lr=0.05
        )
        carry_out(recipe, tmp_path / "alone")

        def die(loop):
            raise Killed

        with monkeypatch.context() as patch:
            stop_after(patch, STEPS_PER_EPOCH + 2, die)
            with pytest.raises(Killed):
                carry_out(recipe, tmp_path / "run")
        halfway = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
        assert "continuing" in carry_out(recipe, tmp_path / "run")
        kept, alone = (
            tmp_path / "run" / "student.safetensors",
            tmp_path / "alone" / "student.safetensors",
        )
        assert kept.read_bytes() == alone.read_bytes() and rows(tmp_path / "run") == rows(
            tmp_path / "alone"
        )
        names = {
            f"{layer}.{kind}" for layer in ("one.0", "two.0", "fc") for kind in ("weight", "bias")
        }
        assert {k.removeprefix("student.") for k in load_file(kept)} == names
        student = load_student(tmp_path / "run", trust_code=True)
        assert not any("adapter" in name for name, _ in student.named_parameters())
        text = [str(k) for k in _keys(halfway)]
        assert any("adapters" in k for k in text) and not any("teacher" in k for k in text)
        row = rows(tmp_path / "run")[-1]
        assert row["weights"] == {"beta": 1e4} and row["parts"]["full"] > 0

    @pytest.mark.parametrize(
        ("method", "options", "parts", "weights"),
        [
            ("gradient", {"beta": 2.0}, ["gradient"], {"beta": 2.0}),
            ("symmetry", {"teacher": None, "squared": False}, ["symmetry"], {"beta": 1.0}),
            ("min-l2", {"teacher": None}, ["min-l2"], {"beta": 1.0}),
        ],
    )
    def test_gradient_methods(self, teacher_run, tmp_path, method, options, parts, weights):
        given = {
            "teacher": str(teacher_run),
            "model": write_factory(tmp_path),
            "epochs": 1,
            "lr": 0.05,
            **options,
        }
        carry_out(small(command="distill", method=method, **given), tmp_path / "run")
        (row,) = rows(tmp_path / "run")
        assert row["weights"] == weights and {*row["parts"]} == {"ce", *parts}
        assert all(0 < row["parts"][p] < 100 for p in parts)
        assert json.loads((tmp_path / "run" / "summary.json").read_text())

    def test_a_sum_by_the_command(self, command, teacher_run, tmp_path):
        student = write_factory(tmp_path)
        said = command(
            f"distill --teacher {teacher_run} --student {student} --out run {FLAGS} --lr 0.05 "
            "--method at+kd+symmetry --beta at=10,symmetry=2 --decay at=linear,kd=warm-up+linear"
        )
        assert said.status == 0, said.err
        found = rows(tmp_path / "run")
        total = 2 * STEPS_PER_EPOCH
        for row in found:
            done = (row["step"] - 1) / total  # the weights of the epoch's last step
            expected = {
                "at.beta": 10 * (1 - done),
                "symmetry.beta": 2.0,
                "alpha": 0.9 * min(done / 0.1, 1) * (1 - done),
            }
            assert row["weights"] == pytest.approx(expected)
            assert {*row["parts"]} == {"ce", "at", "kd", "symmetry"}
        assert [round(row["weights"]["alpha"], 4) for row in found] == [0.5625, 0.1125]


def _keys(state):
    if isinstance(state, dict):
        for key, value in state.items():
            yield key
            yield from _keys(value)
