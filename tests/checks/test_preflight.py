"""What a dry step finds before the first one, that it says nothing of a sound transfer, and that it leaves no trace."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
import torch
from small_runs import carry_out, contents, distilled, rows, stop_after
from torch import nn
from toys import CLASSES, Net, assert_same, batch, count_hooks, make

import attention_transfer as at
from attention_transfer.checks.findings import Finding
from attention_transfer.checks.preflight import preflight
from attention_transfer.checks.teacher import at_least
from attention_transfer.methods import METHODS, Method
from attention_transfer.train.signals import Interrupted


class Noisy(Net):
    """With everything that a training forward changes: batch statistics, dropout, draws of Python and numpy."""

    def __init__(self, **options):
        super().__init__(**options)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        x = self.norm(self.one(x)) * (1 + 0.1 * random.random() + 0.1 * np.random.rand())
        return self.fc(self.drop(self.three(self.two(x))).mean((2, 3)))


class Constant(nn.Module):
    """In the place of a layer: what it puts out, whatever comes in."""

    def __init__(self, layer, value):
        super().__init__()
        self.layer, self.value = layer, value

    def forward(self, x):
        x = self.layer(x)
        return x * 0 + self.value


class Term(Method):
    """A term of one's own; `value` is taken of the student's logits."""

    name = part = "own"

    def __init__(self, value, weight=1.0):
        super().__init__()
        self.value, self.factor = value, weight

    def forward(self, step):
        return self.value(step.student_logits)

    def weight(self, progress):
        return self.factor(progress) if callable(self.factor) else self.factor

    def weights(self, progress):
        return {"own": float(self.weight(progress))}


def both(**options):
    return make(at.ActivationTransfer(), at.KnowledgeDistillation(), **options)


def said(transfer, x=None, y=None, **options):
    """The findings by level."""
    if x is None:
        x, y = batch(8)
    found = preflight(transfer, x, y, **options)
    return {
        level: [f.text for f in found if f.level == level] for level in ("error", "warning", "note")
    }


def only(level, text, found):
    """Asserts that `found` holds one finding, of this level and with this text."""
    assert sum(map(len, found.values())) == 1, found
    assert len(found[level]) == 1 and text in found[level][0], found


def with_layer(name, value, width=4, seed=0):
    net = Net(width, seed=seed)
    setattr(net, name, Constant(getattr(net, name), value))
    return net


def labelled(n, shares=None, classes=CLASSES):
    """Validation batches that a `Knowing` teacher answers rightly for a share of the images."""
    x = torch.arange(n, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 8, 8) / n
    return [(x[i : i + 100], torch.arange(n)[i : i + 100] % classes) for i in range(0, n, 100)]


class Knowing(nn.Module):
    """Reads its answer off the image: right for so many of every ten images of `labelled(n)`."""

    def __init__(self, n, right, classes=CLASSES):
        super().__init__()
        self.n, self.right, self.classes, self.seen = n, right, classes, 0

    def forward(self, x):
        index = (x[:, 0, 0, 0] * self.n).round().long()
        self.seen += len(x)
        answer = (index + (index // self.classes % 10 >= self.right)) % self.classes
        return nn.functional.one_hot(answer, self.classes).float()


class TestASoundTransfer:
    @pytest.mark.parametrize(
        "names", [[], *([n] for n in METHODS), ["at", "kd"], list(METHODS)], ids="+".join
    )
    def test_nothing_is_found(self, names):
        transfer = make(*(METHODS[n]() for n in names)) if names else at.Transfer(Net())
        assert preflight(transfer, *batch(8)) == []

    def test_second_derivatives(self):
        transfer = make(at.GradientTransfer(), at.GradientSymmetry(), at.GradientNorm())
        assert preflight(transfer, *batch(8)) == []

    @pytest.mark.parametrize("decay", ["linear", "cosine", "step", "warm-up", "warm-up+linear"])
    def test_schedules(self, decay):
        transfer = make(
            at.ActivationTransfer(decay=decay), at.KnowledgeDistillation(decay="linear")
        )
        assert preflight(transfer, *batch(8)) == []

    def test_networks_of_the_package(self):
        student, teacher = at.create_model("wrn-10-1", 10), at.create_model("wrn-16-1", 10)
        x, y = batch(8, size=32)
        transfer = at.Transfer(
            student, teacher, [at.ActivationTransfer(), at.KnowledgeDistillation()], example=x
        )
        assert preflight(transfer.train(), x, y) == []

    def test_a_teacher_that_knows(self):
        transfer = make(at.KnowledgeDistillation(), teacher=Knowing(400, 9))
        assert said(transfer, images=labelled(400), teacher_accuracy=0.9) == {
            "error": [],
            "warning": [],
            "note": [],
        }

    def test_it_is_public(self):
        assert at.preflight is preflight


class TestNothingIsChanged:
    @pytest.mark.filterwarnings("ignore:1 layers of the student normalise by their batch")
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("gradient", [True, False])
    def test_bit_for_bit(self, training, gradient):
        methods = (
            [METHODS[n]() for n in METHODS] if gradient else [at.ActivationTransfer(decay="linear")]
        )
        transfer = make(*methods, student=Noisy(), teacher=Noisy(seed=1)).train(training)
        transfer.student.drop.eval()
        transfer.teacher.norm.train()  # somebody's mistake is his to mend
        x, y = batch(8)
        for parameter in transfer.parameters():
            parameter.grad = torch.ones_like(parameter)

        def state():
            networks = (transfer, transfer.teacher)
            return (
                [{k: v.clone() for k, v in m.state_dict().items()} for m in networks],
                [[s.training for s in m.modules()] for m in networks],
                [p.requires_grad for m in networks for p in m.parameters()],
                [(p.grad.data_ptr(), p.grad.sum()) for p in transfer.parameters()],
                [count_hooks(m) for m in networks],
                [b.data_ptr() for m in networks for b in m.buffers()],
                {k: v for k, v in vars(transfer).items() if isinstance(v, (bool, str, int))},
                (random.getstate(), x.requires_grad, x.clone()),
                (
                    np.random.get_state()[1].tolist(),
                    np.random.get_state()[2],
                    torch.get_rng_state().tolist(),
                ),
            )

        before = state()
        preflight(transfer, x, y, images=[batch(8)])
        after = state()
        for a, b in zip(before[0], after[0], strict=True):
            assert_same(a, b, rtol=0, atol=0)
        assert before[1:7] == after[1:7]
        assert before[7][:2] == after[7][:2] and torch.equal(before[7][2], after[7][2])
        assert before[8] == after[8]

    def test_the_next_step_is_the_same(self):
        x, y = batch(8)

        def step(looked):
            torch.manual_seed(0), random.seed(0), np.random.seed(0)
            transfer = both(student=Noisy()).train()
            if looked:
                preflight(transfer, x, y)
            out = transfer(x, y, 0.0)
            out.loss.backward()
            return {n: p.grad for n, p in transfer.student.named_parameters()} | {
                "loss": out.loss.detach()
            }

        assert_same(step(True), step(False), rtol=0, atol=0)

    def test_when_the_networks_fail(self):
        transfer = both(student=Noisy()).train()
        transfer.student.fc = nn.Linear(3, CLASSES)
        hooks, calls = count_hooks(transfer.student), transfer.student.calls.clone()
        with pytest.raises(RuntimeError):
            preflight(transfer, *batch(8))
        assert count_hooks(transfer.student) == hooks and transfer.student.training
        assert transfer.student.calls == calls

    def test_without_gradients_around_it(self):
        with torch.no_grad():
            assert preflight(both(), *batch(8)) == []
            assert not torch.is_grad_enabled()

    def test_a_compiled_transfer_is_not_compiled_for_it(self):
        transfer, ran = both(), []

        def backend(graph, inputs):
            ran.append(graph)
            return graph.forward

        transfer.compile(backend=backend)
        assert preflight(transfer, *batch(8)) == [] and not ran
        transfer(*batch(8))
        assert ran
        assert preflight(torch.compile(both(), backend=backend), *batch(8)) == []

    def test_a_closed_transfer(self):
        transfer = both()
        transfer.close()
        only("error", "was not called", said(transfer))


class TestLayers:
    @pytest.mark.parametrize("layer", ["one", "two", "three"])
    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_dead(self, side, layer):
        found = said(make(at.ActivationTransfer(), **{side: with_layer(layer, 0.0)}))
        assert (
            f"the {side}'s layer {layer} is dead: it puts out zeros for all 8 images"
            in found["error"][0]
        )

    def test_a_relu_that_died(self):
        student = Net()
        nn.init.constant_(student.two[0].bias, -100.0)
        found = said(make(at.ActivationTransfer(), student=student))
        assert any("the student's layer two is dead" in text for text in found["error"])

    def test_one_image_that_is_alive_is_enough(self):
        student = Net()
        x, y = batch(8)
        x[1:] = 0
        for stage in (student.one, student.two, student.three):
            nn.init.zeros_(stage[0].bias)
        assert not any(
            "dead" in text
            for text in said(make(at.ActivationTransfer(), student=student), x, y)["error"]
        )

    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_uniform(self, side):
        class Flat(nn.Module):
            def __init__(self, layer):
                super().__init__()
                self.layer = layer

            def forward(self, x):
                x = self.layer(x)
                return x.mean((2, 3), keepdim=True).expand_as(x) + 0.1

        net = Net()
        net.two = Flat(net.two)
        only(
            "warning",
            f"the {side}'s layer two has the same attention",
            said(make(at.ActivationTransfer(), **{side: net})),
        )
        assert (
            preflight(make(at.FullActivationTransfer(), **{side: net}), *batch(8)) == []
        )  # channels tell it enough

    def test_one_position(self):
        class Pooled(Net):
            def __init__(self, **options):
                super().__init__(**options)
                self.pool = nn.AdaptiveAvgPool2d(1)

            def forward(self, x):
                return self.fc(self.pool(self.three(self.two(self.one(x)))).flatten(1))

        pairs = [("one", "one"), ("pool", "pool")]
        networks = {"student": Pooled(), "teacher": Pooled(seed=1), "pairs": pairs}
        found = said(make(at.ActivationTransfer(), **networks))["warning"]
        assert [text[:24] for text in found] == [
            "the student's layer pool",
            "the teacher's layer pool",
        ]
        assert all("has one position" in text for text in found)
        assert preflight(make(at.ActivationTransfer(axis="channel"), **networks), *batch(8)) == []

    def test_the_same_for_every_image(self):
        pattern = torch.rand(4, 4, 4)
        found = said(make(at.ActivationTransfer(), teacher=with_layer("two", pattern)))
        assert (
            "the teacher's layer two puts out the same features for all 8 images"
            in found["warning"][0]
        )
        x, y = batch(8)
        assert preflight(make(at.ActivationTransfer()), x[:1].expand(8, -1, -1, -1), y) == []

    def test_not_finite(self):
        teacher = Net(8, seed=1)
        teacher.two[0].weight.data[0, 0, 0, 0] = torch.nan
        found = said(make(at.ActivationTransfer(), teacher=teacher))["error"]
        assert "the teacher's layer two puts out values that are not finite" in found
        assert "the term at is not finite: nan" in found

    def test_layers_that_do_not_fit_are_named(self):
        """The constructor refuses them where it has an example; without one the first forward would."""
        pairs = [("one", "one"), ("three", "three")]
        with pytest.raises(at.UserError, match="compares channel by channel"):
            make(at.ActivationTransfer(axis="channel"), pairs=pairs)
        found = said(make(at.ActivationTransfer(axis="channel"), pairs=pairs, example=None))
        only("error", "pair 0 (one ← one): axis='channel' compares channel by channel", found)


class TestTerms:
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_not_finite(self, value):
        only(
            "error",
            "the term own is not finite",
            said(make(Term(lambda logits: logits.sum() + value))),
        )

    def test_not_of_the_student(self):
        text = "the term own does not depend on the student"
        only("error", text, said(make(Term(lambda logits: logits.detach().square().sum()))))
        only("error", text, said(make(Term(lambda logits: (logits * 0).sum() + 1))))

    def test_one_parameter_is_enough(self):
        """The first of the student, which is the last to be looked at."""
        student = Net()
        student.requires_grad_(False)
        student.one[0].bias.requires_grad_(True)
        found = said(make(Term(lambda logits: logits.square().sum()), student=student))
        assert not found["error"] and not found["warning"]

    def test_a_dead_layer_leaves_no_gradient(self):
        found = said(
            make(
                at.ActivationTransfer(),
                student=with_layer("three", 0.0),
                pairs=[("three", "three")],
            )
        )
        assert any("the term at does not depend on the student" in text for text in found["error"])

    def test_zero(self):
        only(
            "warning",
            "the term own is 0, so it teaches nothing",
            said(make(Term(lambda logits: (logits - logits).sum()))),
        )

    def test_a_gradient_that_is_not_finite(self):
        only(
            "error",
            "the gradient of the term own is not finite",
            said(make(Term(lambda logits: 1 + (logits * 0).sqrt().sum()))),
        )

    def test_the_same_network(self):
        found = said(both(teacher=Net()))
        only(
            "warning",
            "the same network with the same weights, so at and kd are 0: is it the right teacher?",
            found,
        )
        teacher = Net()
        teacher.fc.bias.data[0] += 1
        assert (
            "the term at is 0, so it teaches nothing" in said(both(teacher=teacher))["warning"][0]
        )

    def test_a_weight_of_zero(self):
        only(
            "note",
            "the term at weighs 0 from start to end",
            said(make(at.ActivationTransfer(beta=0.0))),
        )
        assert preflight(make(at.KnowledgeDistillation(alpha=1.0)), *batch(8)) == []

    def test_weights_that_do_not_overlap(self):
        """Each term is looked at where it counts: one broken at the end, one at the start."""

        class Late(Term):
            name = part = "late"

        early = Term(lambda logits: logits.detach().sum() + 1e3, lambda p: max(0.0, 0.4 - p))
        late = Late(lambda logits: logits.detach().sum() + 1e3, lambda p: max(0.0, p - 0.6))
        assert [text[:14] for text in said(make(early, late))["error"]] == [
            "the term own d",
            "the term late ",
        ]

    def test_classes_that_differ(self):
        teacher = Net(8, seed=1, classes=7)
        found = said(both(teacher=teacher))
        only(
            "error",
            "the student's logits have 5 and the teacher's logits have 7 classes, and a method compares",
            found,
        )
        assert preflight(make(at.ActivationTransfer(), teacher=teacher), *batch(8)) == []
        assert (
            preflight(make(at.GradientTransfer(), teacher=Net(8, seed=1, classes=3)), *batch(8))
            == []
        )

    def test_labels_that_the_student_does_not_have(self):
        x, y = batch(8)
        only(
            "error",
            "the labels go from 0 to 5, but the student's logits have 5 classes",
            said(both(), x, y.clamp(max=3) + 2 * (y == 4)),
        )


class TestModes:
    def test_a_student_in_eval_mode(self):
        transfer = both(student=Noisy()).eval()
        only(
            "warning",
            "the student is in eval mode, but its BatchNorm2d, Dropout train otherwise",
            said(transfer),
        )
        assert preflight(transfer.train(), *batch(8)) == []
        transfer.student.norm.eval()
        only(
            "note",
            "1 of the student's 2 BatchNorm2d, Dropout stay in eval mode (norm)",
            said(transfer),
        )
        assert preflight(both().eval(), *batch(8)) == []  # nothing in it trains otherwise

    def test_eval_mode_is_what_input_gradients_want(self):
        found = said(make(at.GradientNorm(), student=Noisy()).eval())
        assert found["warning"] == [] and "stay in eval mode" in found["note"][0]

    def test_a_teacher_in_train_mode(self):
        transfer = both()
        transfer.teacher.train()
        only("warning", "the teacher is in train mode", said(transfer))
        assert preflight(transfer.train(), *batch(8)) == []

    def test_frozen_parameters(self):
        transfer = both()
        transfer.student.one.requires_grad_(False)
        only(
            "note",
            "2 of the student's 8 parameters are frozen (one.0.weight, one.0.bias)",
            said(transfer),
        )
        transfer.student.requires_grad_(False)
        only("error", "every parameter of the student is frozen", said(transfer))

    def test_a_teacher_that_is_trained(self):
        transfer = both()
        transfer.teacher.fc.requires_grad_(True)
        only(
            "warning",
            "2 parameters of the teacher require a gradient (fc.weight, fc.bias)",
            said(transfer),
        )


class TestDepth:
    def net(self, strides, seed=0):
        torch.manual_seed(seed)
        widths = [3, *[4] * len(strides)]
        stages = [
            nn.Sequential(nn.Conv2d(a, b, 3, s, 1), nn.Tanh())
            for a, b, s in zip(widths, widths[1:], strides, strict=False)
        ]
        return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))

    def find(self, student, teacher, *pairs):
        x, y = batch(8, size=32)
        return said(
            make(
                at.ActivationTransfer(),
                student=student,
                teacher=teacher,
                pairs=list(pairs),
                example=x,
            ),
            x,
            y,
        )

    def test_strides_that_differ(self):
        found = self.find(self.net([1, 2, 2]), self.net([1, 2, 2, 2], 1), ("0", "3"), ("1", "1"))
        text = "a pair joins the student's 0 (stage 1 of 3, stride 1) with the teacher's 3 (stage 4 of 4, stride 8)"
        only("warning", text, found)
        assert "see `attention-transfer stages STUDENT TEACHER`" in found["warning"][0]

    def test_the_other_end_of_the_network(self):
        only(
            "warning",
            "stage 1 of 2, stride 1",
            self.find(self.net([1, 2]), self.net([1, 2], 1), ("0", "1")),
        )

    def test_neighbours(self):
        deep = [1, 2, 2, 2]
        assert not any(
            self.find(self.net(deep), self.net(deep, 1), ("1", "2"), ("3", "2")).values()
        )

    def test_equal_strides_are_right_wherever_they_stand(self):
        assert not any(
            self.find(self.net([4, 2]), self.net([1, 2, 2, 2], 1), ("0", "2"), ("1", "3")).values()
        )

    def test_inputs_of_two_sizes(self):
        """Strides are from each network's own input."""
        x, y = batch(8, size=16)
        transfer = make(
            at.ActivationTransfer(),
            student=self.net([1, 2, 2]),
            teacher=self.net([1, 2, 2], 1),
            teacher_transform=lambda x: nn.functional.interpolate(x, (64, 64)),
            pairs=[("0", "0"), ("2", "2")],
            example=x,
        )
        assert preflight(transfer, x, y) == []

    def test_tokens(self):
        class Tokens(nn.Module):
            def __init__(self, seed):
                super().__init__()
                torch.manual_seed(seed)
                self.patch = nn.Conv2d(3, 8, 2, 2)
                self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
                self.fc = nn.Linear(8, CLASSES)

            def forward(self, x):
                x = self.patch(x).flatten(2).transpose(1, 2)
                for block in self.blocks:
                    x = x + block(x).tanh()
                return self.fc(x.mean(1))

        found = self.find(Tokens(0), Tokens(1), ("blocks.0", "blocks.5"), ("blocks.2", "blocks.3"))
        only("warning", "a pair joins the student's blocks.0 (33% through", found)


class TestRange:
    norm = nn.BatchNorm2d(3, affine=False, track_running_stats=True).eval()
    norm.running_mean.fill_(0.5)
    norm.running_var.fill_(0.0625)

    def find(self, change):
        x, y = batch(8)
        return said(both(student_transform=self.norm, teacher_transform=self.norm), change(x), y)

    def test_as_it_should_be(self):
        assert not any(self.find(lambda x: x).values())

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (
                lambda x: x * 255,
                "student and teacher's normalisation takes images in [0, 1]: divide by 255",
            ),
            (lambda x: (x - 0.5) * 4, "takes images in [0, 1]: do not normalise them before"),
            (lambda x: x / 255, "were they divided by 255 twice?"),
        ],
    )
    def test_another(self, change, text):
        only("warning", text, self.find(change))

    def test_networks_without_a_normalisation_take_what_they_get(self):
        x, y = batch(8)
        assert preflight(both(), (x - 0.5) * 4, y) == []
        resize = nn.Upsample(scale_factor=2, mode="bilinear")
        assert preflight(both(teacher_transform=resize), (x - 0.5) * 4, y) == []

    def test_not_finite(self):
        x, y = batch(8)
        x[0, 0, 0, 0] = torch.nan
        assert "the batch holds values that are not finite" in said(both(), x, y)["error"]


class TestTeacher:
    def find(self, right, n=400, **options):
        transfer = make(at.KnowledgeDistillation(), teacher=Knowing(n, right))
        found = said(transfer, images=labelled(n), **options)
        return found, transfer.teacher.seen

    def test_near_chance(self):
        found, _ = self.find(2)
        only(
            "warning",
            "the teacher is right for 80 of 400 validation images, no more than guessing among 5 classes",
            found,
        )

    def test_worse_than_it_was(self):
        found, _ = self.find(7, teacher_accuracy=0.95)
        only(
            "warning",
            "right for 280 of 400 validation images (70.0%), but was for 95.0% in its own run",
            found,
        )
        assert "is it the same data and normalisation?" in found["warning"][0]

    @pytest.mark.parametrize("known", [None, 0.7, 0.74])
    def test_as_good_as_it_was(self, known):
        found, _ = self.find(7, teacher_accuracy=known)
        assert not any(found.values())

    def test_it_stops_early(self):
        found, seen = self.find(10, teacher_accuracy=1.0)
        # The batch, once without and once with the loss; then 25 images are enough.
        assert not any(found.values()) and seen - 2 * 8 <= 2 + 25 + 8

    def test_at_most_400_images_are_looked_at(self):
        drawn = []

        def endless():
            while True:
                drawn.append(1)
                yield batch(100)

        transfer = make(at.KnowledgeDistillation())
        nn.init.zeros_(transfer.teacher.fc.weight)
        found = said(transfer, images=endless())
        assert len(drawn) == 4 and "of 400 validation images" in found["warning"][0]

    def test_few_images(self):
        assert not any(self.find(10, n=2)[0].values())  # too few to tell, and all are right

    def test_other_classes_than_the_student(self):
        transfer = make(at.ActivationTransfer(), teacher=Net(8, seed=1, classes=7))
        only(
            "note",
            "its logits have 7 classes, the student's 5",
            said(transfer, images=labelled(100)),
        )

    def test_the_binomial_tail(self):
        from scipy.stats import binom

        for n, p in ((1, 0.5), (25, 0.1), (400, 0.001), (400, 0.1), (400, 0.95)):
            for k in range(0, n + 1, max(1, n // 13)):
                assert at_least(k, n, p) == pytest.approx(
                    binom.sf(k - 1, n, p), rel=1e-9, abs=1e-200
                )


class TestArguments:
    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"x": torch.zeros(8, 3, 8, 8, dtype=torch.uint8)}, "expected floating-point images"),
            ({"x": torch.zeros(3, 8, 8)}, "expected floating-point images"),
            ({"y": torch.zeros(8)}, "expected int64 labels"),
            ({"y": torch.zeros(7, dtype=torch.int64)}, r"expected int64 labels \(8,\)"),
            ({"teacher_accuracy": 93.0}, r"expected a share in \[0, 1\]"),
            ({"transfer": Net()}, "expected a Transfer"),
        ],
    )
    def test_what_is_no_batch(self, change, text):
        x, y = batch(8)
        with pytest.raises(at.UserError, match=text):
            preflight(**({"transfer": both(), "x": x, "y": y} | change))

    def test_a_finding_is_frozen(self):
        finding = Finding("note", "x")
        with pytest.raises(AttributeError):
            finding.text = "y"


@pytest.mark.usefixtures("quick_runs")
class TestInARun:
    def test_a_sound_teacher_changes_nothing(self, student_run, teacher_run, tmp_path, monkeypatch):
        monkeypatch.setattr("attention_transfer.train.run.preflight", lambda *args, **options: [])
        carry_out(distilled(teacher_run), tmp_path / "run")
        assert rows(tmp_path / "run") == rows(student_run)

    def test_what_is_found_is_said_once(self, teacher_run, tmp_path, monkeypatch):
        """The teacher of two epochs is at chance; a run that continues does not say so again."""
        stop_after(monkeypatch, 5, lambda loop: setattr(loop, "stop_signal", 2))
        heard = []
        monkeypatch.setattr(
            "attention_transfer.train.progress.ProgressBar.say",
            lambda self, text: heard.append(text),
        )
        for expected in (1, 1):
            with pytest.raises(Interrupted):
                carry_out(distilled(teacher_run), tmp_path / "run")
            warnings = [
                text for text in heard if text.startswith("warning: the teacher is right for")
            ]
            assert len(warnings) == expected, heard
            stop_after(monkeypatch, 6, lambda loop: setattr(loop, "stop_signal", 2))

    def test_its_own_accuracy_is_known(self, teacher_run, tmp_path, monkeypatch):
        teacher = tmp_path / "teacher"
        teacher.mkdir()
        for name, data in contents(teacher_run).items():
            (teacher / name).write_bytes(data)
        summary = json.loads((teacher / "summary.json").read_text())
        summary["final"]["val_accuracy"] = 0.875
        (teacher / "summary.json").write_text(json.dumps(summary))
        given = {}
        monkeypatch.setattr(
            "attention_transfer.train.run.preflight",
            lambda *args, **options: given.update(options) or [],
        )
        carry_out(distilled(teacher, epochs=1, max_steps=1), tmp_path / "run")
        assert given["teacher_accuracy"] == 0.875
        x, y = map(torch.cat, zip(*given["images"], strict=True))
        assert x.shape == (100, 3, 32, 32) and x.dtype == torch.float32 and 0.9 < x.max() <= 1
        assert torch.bincount(y).tolist() == [10] * 10

    def test_an_error_ends_the_run_before_a_step(self, teacher_run, command, tmp_path):
        from safetensors import safe_open
        from safetensors.torch import save_file

        dead = tmp_path / "dead"
        dead.mkdir()
        for name, data in contents(teacher_run).items():
            (dead / name).write_bytes(data)
        with safe_open(teacher_run / "student.safetensors", "pt") as file:
            state = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            about = file.metadata()
        state |= {
            k: torch.zeros_like(v)
            for k, v in state.items()
            if k.startswith("group2.") and k.endswith("weight")
        }
        save_file(state, dead / "student.safetensors", about)
        words = "--limit-train 128 --limit-val 100 --epochs 2 --batch-size 32 --device cpu --compile off"
        found = command(
            f"distill --teacher dead --student wrn-10-1 --method at --beta 1 {words} --out run"
        )
        assert found.status == 2
        assert "the teacher's layer group2 is dead" in found.err and found.err.count("\n") == 1
        assert not (tmp_path / "run").exists()  # nothing stands in the way of the next try


def test_the_teacher_is_copied_and_left_alone():
    teacher = Net(8, seed=1)
    before = copy.deepcopy(teacher.state_dict())
    preflight(both(teacher=teacher), *batch(8))
    assert_same(dict(teacher.state_dict()), before, rtol=0, atol=0)
