"""Input gradients and second derivatives: closed forms, finite differences, other modes."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import reference
from oracles.second_order import forward_over_reverse
from torch import nn
from toys import CLASSES, Net, assert_same, batch, close, draw, gradients, make

import attention_transfer as at
from attention_transfer import second_order
from attention_transfer.second_order import batch_dependent_layers

SETS = {
    "gradient": lambda: [at.GradientTransfer(2)],
    "gradient, not squared": lambda: [at.GradientTransfer(2, squared=False)],
    "symmetry": lambda: [at.GradientSymmetry(3)],
    "symmetry, not squared": lambda: [at.GradientSymmetry(3, squared=False)],
    "min-l2": lambda: [at.GradientNorm(4)],
    "all": lambda: [
        at.GradientSymmetry(3, decay="linear"),
        at.ActivationTransfer(50),
        at.GradientNorm(4, decay="warm-up"),
        at.KnowledgeDistillation(0.7, decay="cosine"),
        at.FullActivationTransfer(100),
        at.GradientTransfer(2, squared=False),
    ],
}


class Tiny(nn.Module):
    """Few weights, each for finite differences; `smooth`, or with ReLU and max-pooling."""

    def __init__(self, smooth=True, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.one, self.two, self.fc = (
                nn.Conv2d(2, 3, 3),
                nn.Conv2d(3, 3, 2, 2, 1),
                nn.Linear(3, 3),
            )
        self.smooth = smooth
        self.double()

    def forward(self, x):
        x = self.one(x)
        x = F.avg_pool2d(x.tanh(), 2, 1) if self.smooth else F.max_pool2d(x.relu(), 2, 1)
        x = self.two(x)
        return self.fc((F.softplus(x) if self.smooth else x.relu()).mean((2, 3)))


tiny = pytest.mark.parametrize("smooth", [True, False], ids=["smooth", "ReLU and max-pooling"])


def tiny_batch(n=3):
    return draw(n, 2, 6, 6, seed=1), torch.arange(n) % 3


def summed(model, x, y):
    return F.cross_entropy(model(x), y, reduction="sum")


def central(function, at_, step=1e-6):
    """∂function/∂at_ by central differences, each element moved in place."""
    found = torch.zeros_like(at_)
    with torch.no_grad():
        for place, into in zip(at_.view(-1), found.view(-1), strict=True):
            kept = place.item()
            ends = []
            for end in (kept + step, kept - step):
                place.fill_(end)
                ends.append(function())
            place.fill_(kept)
            into.fill_((ends[0] - ends[1]) / (2 * step))
    return found


def steps(transfer, x, y, progress=0.3):
    """(output, gradients) of one step."""
    transfer.zero_grad()
    out = transfer(x, y, progress)
    out.loss.backward()
    return out, gradients(transfer)


def double(methods, **options):
    options.setdefault("student", Net().double())
    example = batch(dtype=torch.float64)[0]
    if any(method.needs_teacher for method in methods):
        options["teacher"] = Net(8, seed=1).double()
    return make(*methods, example=example, **options)


@pytest.fixture(params=["double backward", "torch.func"])
def each_mode(request, monkeypatch):
    """Eager mode as it is, and with the derivation of a compiled region."""
    if request.param == "torch.func":
        monkeypatch.setattr(second_order, "_by_double_backward", second_order._by_torch_func)


class TestInputGradient:
    @tiny
    def test_it_is_that_of_the_sum(self, smooth):
        model, (x, y) = Tiny(smooth), tiny_batch()
        j = at.input_gradient(model, x, y)
        assert j.shape == x.shape and j.dtype == x.dtype and not j.requires_grad
        x.requires_grad_()
        close(j, torch.autograd.grad(summed(model, x, y), x)[0], 1e-12)
        assert all(p.grad is None for p in model.parameters()) and x.grad is None

    @tiny
    def test_finite_differences(self, smooth):
        model, (x, y) = Tiny(smooth), tiny_batch()
        expected = central(lambda: summed(model, x, y), x, 1e-5)
        close(at.input_gradient(model, x, y), expected, 1e-8)

    @pytest.mark.parametrize("create_graph", [False, True])
    def test_a_sample_has_its_own(self, create_graph):
        """Alone, in a batch of five, among duplicates, in any order."""
        model, (x, y) = Tiny(), tiny_batch(5)
        together = at.input_gradient(model, x, y, create_graph).detach()
        for n in range(5):
            close(
                at.input_gradient(model, x[n : n + 1], y[n : n + 1], create_graph),
                together[n : n + 1],
                1e-12,
            )
        order = torch.tensor([3, 1, 1, 4, 0, 2, 2, 2])
        close(at.input_gradient(model, x[order], y[order], create_graph), together[order], 1e-12)

    def test_linear_classifier_by_hand(self):
        w, b, x, y = (
            draw(4, 12),
            draw(4, seed=1),
            draw(5, 3, 2, 2, seed=2),
            torch.tensor([0, 3, 1, 1, 2]),
        )
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()
        model.load_state_dict({"1.weight": w, "1.bias": b})
        target = draw(5, 3, 2, 2, seed=3)
        arrays = w.numpy(), b.numpy(), x.flatten(1).numpy(), y.numpy()
        value, j, dw, db = reference.linear_gradient_norm(*arrays)
        close(at.input_gradient(model, x, y).flatten(1), j, 1e-12)
        for loss, expected in (
            (at.gradient_norm_loss(model, x, y), (value, dw, db)),
            (
                at.gradient_loss(at.input_gradient(model, x, y, create_graph=True), target),
                [
                    r
                    for i, r in enumerate(
                        reference.linear_gradient_norm(*arrays, target.flatten(1).numpy())
                    )
                    if i != 1
                ],
            ),
        ):
            found = (loss, *torch.autograd.grad(loss, tuple(model.parameters())))
            for a, e in zip(found, expected, strict=True):
                close(a, np.asarray(e), 1e-12)

    def test_a_graph_from_before_the_images(self):
        """With a graph, x may come from something that is trained; J is still with respect to x."""
        model, (x, y) = Tiny(), tiny_batch()
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)

        def loss():
            return at.gradient_norm_loss(model, x * scale, y)

        (found,) = torch.autograd.grad(loss(), scale)
        close(found, central(loss, scale.detach()), 1e-7)

    def test_bfloat16_autocast(self):
        model = Tiny().float()
        x, y = (t.float() if t.is_floating_point() else t for t in tiny_batch())
        exact = at.input_gradient(model, x, y)
        with torch.autocast("cpu", torch.bfloat16):
            j = at.input_gradient(model, x, y)
            loss = at.gradient_norm_loss(model, x, y)
        assert j.dtype == torch.float32 and loss.dtype == torch.float32
        assert 0 < (j - exact).norm() < 0.03 * exact.norm()
        loss.backward()
        found = gradients(model)
        model.zero_grad()
        at.gradient_norm_loss(model, x, y).backward()
        for name, expected in gradients(model).items():
            assert (found[name] - expected).norm() < 0.05 * expected.norm(), name

    def test_the_models_own_precision(self):
        x, y = batch(dtype=torch.bfloat16)
        assert at.input_gradient(Net().bfloat16(), x, y).dtype == torch.bfloat16

    def test_compiled_around_it(self):
        torch.compiler.reset()
        model, (x, y) = Net().double(), batch(dtype=torch.float64)

        def loss():
            j = at.input_gradient(model, x, y, create_graph=True)
            return at.gradient_loss(j, 0 * x, squared=False) + at.symmetry_loss(model, x, y)

        loss().backward()
        expected = gradients(model)
        model.zero_grad()
        torch.compile(loss, backend="aot_eager", fullgraph=True)().backward()
        assert_same(gradients(model), expected, rtol=1e-10, atol=1e-12)

    def test_a_compiled_model(self):
        torch.compiler.reset()
        plain, (x, y) = Net(), batch()
        inside = copy.deepcopy(plain)
        inside.compile(backend="aot_eager")
        for compiled in (torch.compile(plain, backend="aot_eager"), inside):
            torch.testing.assert_close(
                at.input_gradient(compiled, x, y), at.input_gradient(plain, x, y)
            )
            for loss in (at.gradient_norm_loss, at.symmetry_loss):
                with pytest.raises(
                    at.UserError, match="compiled model cannot be differentiated twice.*plain model"
                ):
                    loss(compiled, x, y)

    @pytest.mark.parametrize(
        ("x", "y"),
        [
            (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)),
            (torch.zeros(4, 3, 8, 8), torch.zeros(3, dtype=torch.int64)),
            (torch.zeros(4, 3, 8, 8), torch.zeros(4)),
            (torch.zeros(4, 3, 8, 8), torch.zeros(4, CLASSES, dtype=torch.int64)),
            (torch.zeros(4), torch.zeros(4, dtype=torch.int64)),
        ],
    )
    def test_what_is_no_batch(self, x, y):
        with pytest.raises(
            ValueError, match=r"expected \(N, C, H, W\) of floats and \(N,\) of class numbers"
        ):
            at.input_gradient(Net(), x, y)
        with pytest.raises(ValueError, match="expected"):
            at.gradient_norm_loss(Net(), x, y)

    def test_a_batch_of_whole_numbers(self):
        x, y = batch()
        halves = {"student_transform": lambda x: x / 255, "teacher_transform": lambda x: x / 255}
        with pytest.raises(at.UserError, match="torch.uint8 and labels.*expected"):
            make(at.GradientTransfer(), example=None, **halves)((255 * x).byte(), y)

    def test_inference_mode(self):
        x, y = batch()
        with torch.inference_mode(), pytest.raises(at.UserError, match=r"use torch.no_grad\(\)"):
            at.input_gradient(Net(), x, y)
        with torch.no_grad():
            assert at.input_gradient(Net(), x, y).abs().sum() > 0

    def test_shapes_that_differ(self):
        for a, b in (((4, 3, 8, 8), (4, 3, 8, 7)), ((4, 3, 8, 8), (1, 3, 8, 8)), ((4,), (4,))):
            with pytest.raises(ValueError, match="expected two"):
                at.gradient_loss(torch.zeros(a), torch.zeros(b))


class TestLosses:
    """Weight gradients of the public losses, every weight against central differences."""

    @tiny
    @pytest.mark.parametrize("squared", [True, False])
    @pytest.mark.parametrize("name", ["gradient", "symmetry", "min-l2"])
    def test_finite_differences(self, name, squared, smooth):
        model, (x, y) = Tiny(smooth), tiny_batch()
        teacher = at.input_gradient(Tiny(smooth, seed=1), x, y)

        def loss():
            if name == "symmetry":
                return at.symmetry_loss(model, x, y, squared)
            if name == "min-l2":
                return at.gradient_norm_loss(model, x, y)
            return at.gradient_loss(
                at.input_gradient(model, x, y, create_graph=True), teacher, squared
            )

        loss().backward()
        for key, p in model.named_parameters():
            expected = central(loss, p.data)
            # The last bias moves J through the softmax alone, every other weight through layers.
            assert expected.abs().max() > 1e-6, key
            torch.testing.assert_close(p.grad, expected, rtol=1e-5, atol=1e-8)

    def test_values_by_hand(self):
        a, b = draw(4, 2, 3, 3), draw(4, 2, 3, 3, seed=1)
        d = (a - b).numpy().reshape(4, -1)
        close(at.gradient_loss(a, b), np.asarray((d**2).sum(1).mean() / 2), 1e-12)
        close(
            at.gradient_loss(a, b, squared=False),
            np.asarray(np.linalg.norm(d, axis=1).mean() / 2),
            1e-12,
        )
        assert at.gradient_loss(a.bfloat16(), b.bfloat16()).dtype == torch.float32

    @pytest.mark.parametrize("squared", [True, False])
    def test_symmetry_is_the_public_pieces(self, squared):
        model, (x, y) = Tiny(), tiny_batch()
        mirrored = at.input_gradient(model, x.flip(3), y).flip(3)
        expected = at.gradient_loss(at.input_gradient(model, x, y), mirrored, squared)
        close(at.symmetry_loss(model, x, y, squared), expected, 1e-12)
        assert expected > 1e-5

    @pytest.mark.parametrize("squared", [True, False])
    def test_equal_gradients(self, squared):
        """J_S = J_T in some samples or in all: zero there, with a gradient of 0 and not NaN."""
        j = draw(3, 2, 4, 4).requires_grad_()
        (found,) = torch.autograd.grad(at.gradient_loss(j, j.detach(), squared), j)
        assert (found == 0).all()
        other = j.detach() + torch.tensor([0, 1.0, 0]).view(3, 1, 1, 1)
        (found,) = torch.autograd.grad(at.gradient_loss(j, other, squared), j)
        assert found.isfinite().all() and (found[[0, 2]] == 0).all() and (found[1] != 0).all()
        model, (x, y) = Tiny(), tiny_batch()
        loss = at.gradient_loss(
            at.input_gradient(model, x, y, True), at.input_gradient(model, x, y), squared
        )
        loss.backward()
        assert loss.item() == 0 and all((p.grad == 0).all() for p in model.parameters())


class Symmetrised(nn.Module):
    """f(x) + f(flip(x)): the logits of an image and of its mirror image are the same."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) + self.model(x.flip(-1))


class TestSymmetricNetworks:
    @tiny
    @pytest.mark.parametrize("squared", [True, False])
    def test_symmetrised_logits(self, smooth, squared):
        model, (x, y) = Symmetrised(Tiny(smooth)), tiny_batch()
        loss = at.symmetry_loss(model, x, y, squared)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-15)
        assert at.gradient_norm_loss(model, x, y) > 1e-4  # J itself is not zero
        if squared:
            assert all(p.grad.abs().max() < 1e-14 for p in model.parameters())
        assert all(p.grad.isfinite().all() for p in model.parameters())

    @pytest.mark.parametrize("squared", [True, False])
    def test_symmetric_kernels(self, squared):
        """Exactly zero in every bit, so that the slope is 0 under the norm itself."""
        model, (x, y) = Tiny(smooth=False), tiny_batch()
        x = (x + x.flip(-1)) / 2  # its own mirror image
        loss = at.symmetry_loss(model, x, y, squared)
        (j,) = (at.input_gradient(model, x, y),)
        assert loss > 1e-6 and not torch.equal(j, j.flip(-1))  # no symmetric network yet
        mean = nn.Sequential(
            nn.Conv2d(2, 3, (3, 1)), nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ).double()
        loss = at.symmetry_loss(mean, x, y, squared)
        loss.backward()
        assert loss.item() == 0 and all((p.grad == 0).all() for p in mean.parameters())


class TestModes:
    @pytest.mark.parametrize("chosen", SETS)
    def test_torch_func_equals_double_backward(self, chosen, monkeypatch):
        x, y = batch(6, dtype=torch.float64)
        expected, reached = steps(double(SETS[chosen]()), x, y)
        assert all(p > 0 for p in expected.parts.values())
        assert all(g.norm() > 0 for g in reached.values())
        monkeypatch.setattr(second_order, "_by_double_backward", second_order._by_torch_func)
        out, found = steps(double(SETS[chosen]()), x, y)
        assert_same(out.parts, expected.parts, rtol=1e-10, atol=1e-12)
        close(out.loss, expected.loss)
        close(out.logits, expected.logits)
        assert_same(found, reached, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("chosen", [name for name in SETS if name != "all"])
    def test_forward_over_reverse_gives_the_same(self, chosen):
        x, y = batch(6, dtype=torch.float64)
        (method,) = SETS[chosen]()
        transfer = double([method])
        transfer(x, y).parts[method.name].backward()
        images, labels = torch.cat([x, x.flip(-1)]), torch.cat([y, y])

        def loss(j):
            j, mirrored = j.chunk(2)
            if method.name == "symmetry":
                target = mirrored.flip(-1)
            elif method.name == "gradient":
                target = at.input_gradient(transfer.teacher, x, y)
            else:
                target = torch.zeros_like(j)
            return method.beta * at.gradient_loss(j, target, method.squared)

        expected = forward_over_reverse(transfer.student, images, labels, loss)
        assert_same(gradients(transfer.student), expected, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize(
        ("chosen", "from_outside"),
        [("all", False), ("gradient, not squared", True), ("symmetry", True)],
    )
    def test_compiled(self, chosen, from_outside):
        torch.compiler.reset()
        x, y = batch(6, dtype=torch.float64)
        progress = torch.tensor(0.3, dtype=torch.float64)
        pairs = [("two", "two")]
        expected, reached = steps(double(SETS[chosen](), pairs=pairs), x, y, progress)
        transfer = double(SETS[chosen](), pairs=pairs)
        if from_outside:
            compiled = torch.compile(transfer, backend="aot_eager", fullgraph=True)
        else:
            (compiled := transfer).compile(backend="aot_eager", fullgraph=True)
        out = compiled(x, y, progress)
        out.loss.backward()
        assert_same(out.parts, expected.parts, rtol=1e-10, atol=1e-12)
        assert_same(gradients(transfer), reached, rtol=1e-10, atol=1e-12)

    def test_inductor(self):
        torch.compiler.reset()
        x, y = (t.float() if t.is_floating_point() else t for t in tiny_batch())
        student, methods = Tiny().float(), [at.GradientSymmetry(squared=False)]
        expected, reached = steps(at.Transfer(student, None, methods), x, y)
        transfer = at.Transfer(student, None, methods)
        transfer.compile(fullgraph=True)
        out, found = steps(transfer, x, y)
        assert_same(out.parts, expected.parts, rtol=1e-4, atol=1e-6)
        assert_same(found, reached, rtol=1e-3, atol=1e-6)


class TestTransfer:
    def test_parts_are_the_public_functions(self):
        x, y = batch(6, dtype=torch.float64)
        transfer = double(SETS["all"]())
        out, student = transfer(x, y, 0.3), transfer.student
        j, k = at.input_gradient(student, x, y), at.input_gradient(transfer.teacher, x, y)
        close(out.parts["symmetry"], 0.7 * 3 * at.symmetry_loss(student, x, y))
        close(out.parts["min-l2"], 4 * at.gradient_norm_loss(student, x, y))
        close(out.parts["gradient"], 2 * at.gradient_loss(j, k, squared=False))
        plain = double([m for m in SETS["all"]() if not m.needs_gradient])(x, y, 0.3)
        for name, part in plain.parts.items():
            close(out.parts[name], part)
        close(out.logits, plain.logits)

    @pytest.mark.usefixtures("each_mode")
    def test_with_respect_to_the_batch_before_normalisation(self):
        x, y = batch(dtype=torch.float64)
        mean, std, other = 0.4, torch.tensor([0.2, 0.3, 0.1]).double().view(3, 1, 1), 0.15
        student, teacher = Net().double(), Net(8, seed=1).double()
        transfer = make(
            at.GradientTransfer(),
            at.GradientSymmetry(),
            at.GradientNorm(),
            student=student,
            teacher=teacher,
            example=x,
            student_transform=lambda x: (x - mean) / std,
            teacher_transform=lambda x: x / other,
        )
        out, found = steps(transfer, x, y)

        def seen(x):  # by the chain rule: J of the normalised image, divided by std
            return at.input_gradient(student, (x - mean) / std, y, True) / std

        j, k = seen(x), at.input_gradient(teacher, x / other, y) / other
        expected = {
            "ce": F.cross_entropy(student((x - mean) / std), y),
            "gradient": at.gradient_loss(j, k),
            "symmetry": at.gradient_loss(j, seen(x.flip(-1)).flip(-1)),
            "min-l2": at.gradient_loss(j, 0 * j),
        }
        assert_same(out.parts, expected, rtol=1e-10, atol=1e-12)
        student.zero_grad()
        sum(expected.values()).backward()
        assert_same(
            found,
            {f"student.{n}": g for n, g in gradients(student).items()},
            rtol=1e-10,
            atol=1e-12,
        )

    @pytest.mark.usefixtures("each_mode")
    def test_each_part_by_itself(self):
        x, y = batch(dtype=torch.float64)
        transfer = double(SETS["all"]())
        total = steps(transfer, x, y)[1]
        summed = {n: torch.zeros_like(g) for n, g in total.items()}
        for part in transfer(x, y, 0.3).parts:
            transfer.zero_grad()
            transfer(x, y, 0.3).parts[part].backward()
            for name, g in gradients(transfer).items():
                summed[name] += g
            if part in ("symmetry", "gradient", "min-l2"):
                assert transfer.student.one[0].weight.grad.norm() > 0
        assert_same(summed, total, rtol=1e-10, atol=1e-12)

    @pytest.mark.usefixtures("each_mode")
    def test_without_gradients(self):
        x, y = batch(dtype=torch.float64)
        transfer = double(SETS["all"]())
        expected = transfer(x, y, 0.3)
        with torch.no_grad():
            out = transfer(x, y, 0.3)
        assert not out.loss.requires_grad and not out.logits.requires_grad
        assert not any(p.requires_grad for p in out.parts.values())
        assert_same(
            out.parts, {n: p.detach() for n, p in expected.parts.items()}, rtol=1e-10, atol=1e-12
        )

    @pytest.mark.usefixtures("each_mode")
    def test_the_teacher_is_left_alone(self):
        """Its J is built without a graph, and nothing of it changes."""
        x, y = batch(dtype=torch.float64)
        transfer = double(SETS["gradient"]())
        before = copy.deepcopy(transfer.teacher.state_dict())
        output = transfer.run_teacher(x, y)
        logits, j = output.logits, output.gradient
        assert not j.requires_grad and j.grad_fn is None and not logits.requires_grad
        close(j, at.input_gradient(transfer.teacher, x, y))
        steps(transfer, x, y)
        assert all(p.grad is None and not p.requires_grad for p in transfer.teacher.parameters())
        assert all(torch.equal(v, before[k]) for k, v in transfer.teacher.state_dict().items())
        assert transfer.run_teacher(x).gradient is None

    def test_no_teacher_is_needed(self):
        x, y = batch(dtype=torch.float64)
        student = Net().double()
        transfer = at.Transfer(student, None, [at.GradientSymmetry(2), at.GradientNorm(3)])
        out = transfer(x, y)
        close(out.parts["symmetry"], 2 * at.symmetry_loss(student, x, y))
        close(out.parts["min-l2"], 3 * at.gradient_norm_loss(student, x, y))

    @pytest.mark.usefixtures("each_mode")
    def test_bfloat16_autocast(self):
        x, y = batch()
        methods = [at.GradientTransfer(30), at.GradientSymmetry(30), at.GradientNorm(30)]
        exact, expected = steps(make(*methods), x, y)
        with torch.autocast("cpu", torch.bfloat16):
            transfer = make(*methods)
            out = transfer(x, y)
        out.loss.backward()
        assert_same(out.parts, exact.parts, rtol=0.05, atol=1e-3)
        for name, g in gradients(transfer).items():
            assert (g - expected[name]).norm() < 0.1 * expected[name].norm() + 1e-3, name

    def test_a_student_compiled_in_place(self):
        """Its compiled call, which has no second derivative, is not used, with taps or without."""
        x, y = batch(dtype=torch.float64)
        student = Net().double()
        expected = steps(at.Transfer(copy.deepcopy(student), None, [at.GradientNorm()]), x, y)[1]
        student.compile(backend="aot_eager")
        assert_same(steps(at.Transfer(student, None, [at.GradientNorm()]), x, y)[1], expected)


def batch_normalised():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Softplus(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, CLASSES),
    )


def with_dropout():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, CLASSES)
    )


class TestWhatStandsInTheWay:
    def test_batch_normalisation_in_training(self):
        student, (x, y) = batch_normalised(), batch()
        transfer = at.Transfer(student, None, [at.GradientNorm(), at.GradientSymmetry()])
        with pytest.warns(UserWarning, match=r"in 1 layer \(1\).*min-l2, symmetry: .*eval mode"):
            transfer(x, y)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            transfer(x, y)  # said once
            at.Transfer(student, None, [])(x, y)
            student.eval()
            at.Transfer(student, None, [at.GradientNorm()])(x, y)
            at.Transfer(with_dropout(), None, [at.GradientNorm()])(x, y)

    @pytest.mark.parametrize("from_outside", [False, True])
    @pytest.mark.filterwarnings("ignore:.*in 1 layer")
    def test_batch_normalisation_compiled(self, from_outside):
        """Weight gradients, running statistics and the count of batches are those of eager mode."""
        torch.compiler.reset()
        x, y = batch(dtype=torch.float64)
        one = batch_normalised().double()
        two = copy.deepcopy(one)
        methods = [at.GradientNorm(), at.GradientSymmetry(squared=False)]
        expected = steps(at.Transfer(one, None, methods), x, y)[1]
        call = transfer = at.Transfer(two, None, methods)
        if from_outside:
            call = torch.compile(transfer, backend="aot_eager", fullgraph=True)
        else:
            transfer.compile(backend="aot_eager", fullgraph=True)
        call(x, y).loss.backward()
        assert_same(gradients(transfer), expected, rtol=1e-10, atol=1e-12)
        assert_same(two.state_dict(), one.state_dict(), rtol=1e-12, atol=1e-12)
        assert two[1].num_batches_tracked == 1 and "num_batches_tracked" in two[1]._buffers

    def test_input_gradients_warn_too(self):
        model, (x, y) = batch_normalised(), batch()
        for use in (at.input_gradient, at.gradient_norm_loss, at.symmetry_loss):
            with pytest.warns(
                UserWarning,
                match="uses statistics of the batch in 1 layer .*put the model in eval mode",
            ):
                use(model, x, y)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            at.input_gradient(model.eval(), x, y)

    def test_which_layers_couple(self):
        assert (
            batch_dependent_layers(batch_normalised()) == ["1"]
            and batch_dependent_layers(batch_normalised().eval()) == []
        )
        without = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3))
        assert batch_dependent_layers(without.eval()) == ["0"]

    def test_dropout(self, monkeypatch):
        x, y = batch()
        transfer = at.Transfer(with_dropout(), None, [at.GradientNorm()])
        found = []
        for mode in (second_order._by_torch_func, second_order._by_double_backward):
            monkeypatch.setattr(second_order, "_by_double_backward", mode)
            torch.manual_seed(0)
            found.append(steps(transfer, x, y)[1])
        assert_same(*found)
