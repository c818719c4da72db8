"""What preflight finds before any loss: modes, parameters, range, features, pairs."""

from __future__ import annotations

import pytest
import torch
from preflight_toys import (
    Noisy,
    assert_only,
    findings_of,
    make_at_kd,
    net_with_constant,
)
from torch import nn
from toys import CLASSES, Net, batch, make

import attention_transfer as at
from attention_transfer.checks.preflight import preflight


class TestLayers:
    @pytest.mark.parametrize("layer", ["one", "two", "three"])
    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_dead(self, side, layer):
        findings = findings_of(
            make(at.ActivationTransfer(1.0), **{side: net_with_constant(layer, 0.0)})
        )
        assert (
            f"the {side}'s layer {layer} is dead: it outputs zeros for all 8 images"
            in findings["error"][0]
        )

    def test_a_relu_that_died(self):
        student = Net()
        nn.init.constant_(student.two[0].bias, -100.0)
        findings = findings_of(make(at.ActivationTransfer(), student=student))
        assert any("the student's layer two is dead" in text for text in findings["error"])

    def test_one_image_that_is_alive_is_enough(self):
        student = Net()
        x, y = batch(8)
        x[1:] = 0
        for stage in (student.one, student.two, student.three):
            nn.init.zeros_(stage[0].bias)
        assert not any(
            "dead" in text
            for text in findings_of(make(at.ActivationTransfer(), student=student), x, y)["error"]
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
        assert_only(
            "warning",
            f"the {side}'s layer two has the same attention",
            findings_of(make(at.ActivationTransfer(), **{side: net})),
        )
        assert (
            preflight(make(at.FullActivationTransfer(), **{side: net}), *batch(8)) == []
        )  # channels tell it enough

    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_a_norm_of_each_position(self, side):
        class ChannelNorm(nn.LayerNorm):
            def forward(self, x):
                return super().forward(x.movedim(1, -1)).movedim(-1, 1)

        net = Net()
        norm = ChannelNorm(net.two[0].out_channels)
        nn.init.uniform_(norm.weight, 0.5, 2)  # so that the map is not quite uniform
        net.two.norm = norm
        pair = {"student": ("two.norm", "two"), "teacher": ("two", "two.norm")}
        assert_only(
            "warning",
            f"the {side}'s layer two.norm is a ChannelNorm, which gives each position nearly",
            findings_of(make(at.ActivationTransfer(), pairs=[pair[side]], **{side: net})),
        )

    def test_one_position(self):
        class Pooled(Net):
            def __init__(self, **options):
                super().__init__(**options)
                self.pool = nn.AdaptiveAvgPool2d(1)

            def forward(self, x):
                return self.fc(self.pool(self.three(self.two(self.one(x)))).flatten(1))

        pairs = [("one", "one"), ("pool", "pool")]
        networks = {"student": Pooled(), "teacher": Pooled(seed=1), "pairs": pairs}
        findings = findings_of(make(at.ActivationTransfer(), **networks))["warning"]
        assert [text[:24] for text in findings] == [
            "the student's layer pool",
            "the teacher's layer pool",
        ]
        assert all("has one position" in text for text in findings)
        assert preflight(make(at.ActivationTransfer(axis="channel"), **networks), *batch(8)) == []

    def test_the_same_for_every_image(self):
        pattern = torch.rand(4, 4, 4)
        findings = findings_of(
            make(at.ActivationTransfer(), teacher=net_with_constant("two", pattern))
        )
        assert (
            "the teacher's layer two outputs the same features for all 8 images"
            in findings["warning"][0]
        )
        x, y = batch(8)
        assert preflight(make(at.ActivationTransfer()), x[:1].expand(8, -1, -1, -1), y) == []

    def test_not_finite(self):
        teacher = Net(8, seed=1)
        teacher.two[0].weight.data[0, 0, 0, 0] = torch.nan
        findings = findings_of(make(at.ActivationTransfer(1.0), teacher=teacher))["error"]
        assert "the teacher's layer two outputs values that are not finite" in findings
        assert "the term at is not finite: nan" in findings

    def test_layers_that_do_not_fit_are_named(self):
        """The constructor refuses them if it has an example; else preflight does."""
        pairs = [("one", "one"), ("three", "three")]
        with pytest.raises(at.UserError, match="compares channel by channel"):
            make(at.ActivationTransfer(axis="channel"), pairs=pairs)
        findings = findings_of(
            make(at.ActivationTransfer(1.0, axis="channel"), pairs=pairs, example=None)
        )
        assert_only(
            "error", "pair 0 (one ← one): axis='channel' compares channel by channel", findings
        )


class TestModes:
    def test_a_student_in_eval_mode(self):
        transfer = make_at_kd(student=Noisy()).eval()
        assert_only(
            "warning",
            "the student is in eval mode, but its BatchNorm2d, Dropout differ in training",
            findings_of(transfer),
        )
        assert preflight(transfer.train(), *batch(8)) == []
        transfer.student.norm.eval()
        assert_only(
            "note",
            "1 of the student's 2 BatchNorm2d, Dropout stay in eval mode (norm)",
            findings_of(transfer),
        )
        assert preflight(make_at_kd().eval(), *batch(8)) == []  # nothing in it trains otherwise

    def test_eval_mode_is_what_input_gradients_want(self):
        findings = findings_of(make(at.GradientNorm(), student=Noisy()).eval())
        assert findings["warning"] == [] and "stay in eval mode" in findings["note"][0]

    def test_a_teacher_in_train_mode(self):
        transfer = make_at_kd()
        transfer.teacher.train()
        assert_only("warning", "the teacher is in train mode", findings_of(transfer))
        assert preflight(transfer.train(), *batch(8)) == []

    def test_frozen_parameters(self):
        transfer = make_at_kd()
        transfer.student.one.requires_grad_(False)
        assert_only(
            "note",
            "2 of the student's 8 parameters are frozen (one.0.weight, one.0.bias)",
            findings_of(transfer),
        )
        transfer.student.requires_grad_(False)
        assert_only("error", "every parameter of the student is frozen", findings_of(transfer))

    def test_a_teacher_that_is_trained(self):
        transfer = make_at_kd()
        transfer.teacher.fc.requires_grad_(True)
        assert_only(
            "warning",
            "2 parameters of the teacher require a gradient (fc.weight, fc.bias)",
            findings_of(transfer),
        )


class Tokens(nn.Module):
    """A little transformer without attention: tokens on a grid of 16×16."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.patch = nn.Conv2d(3, 8, 2, 2)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.fc(self.features(x).mean(1))

    def features(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x).tanh()
        return x


class Wrapped(nn.Module):
    """A user's network around another, of which it takes the features."""

    def __init__(self, tokens):
        super().__init__()
        self.body = tokens
        self.body.forward = tokens.features
        self.fc = tokens.fc

    def forward(self, x):
        return self.fc(self.body(x).mean(1))


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
        return findings_of(
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
        findings = self.find(self.net([1, 2, 2]), self.net([1, 2, 2, 2], 1), ("0", "3"), ("1", "1"))
        student, teacher = "0 (stage 1 of 3, stride 1)", "3 (stage 4 of 4, stride 8)"
        text = f"a pair joins the student's {student} with the teacher's {teacher}"
        assert_only("warning", text, findings)
        assert "see `attention-transfer stages STUDENT TEACHER`" in findings["warning"][0]

    def test_the_other_end_of_the_network(self):
        assert_only(
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
        findings = self.find(
            Tokens(0), Tokens(1), ("blocks.0", "blocks.5"), ("blocks.2", "blocks.3")
        )
        assert_only("warning", "a pair joins the student's blocks.0 (25% through", findings)

    def test_a_container_is_as_deep_as_its_end(self):
        """It is defined before all that it holds."""
        wrapped = Wrapped(Tokens(0))
        assert not any(self.find(wrapped, Tokens(1), ("body", "blocks.5")).values())
        assert not any(self.find(Tokens(1), Wrapped(Tokens(0)), ("blocks.5", "body")).values())
        findings = self.find(wrapped, Tokens(1), ("body", "blocks.0"))
        text = "the student's body (88% through its network) with the teacher's blocks.0 (25%"
        assert_only("warning", text, findings)

    def test_layers_that_run_in_another_order_than_defined(self):
        class Reversed(Tokens):
            def forward(self, x):
                x = self.patch(x).flatten(2).transpose(1, 2)
                for block in reversed(self.blocks):
                    x = x + block(x).tanh()
                return self.fc(x.mean(1))

        assert not any(self.find(Reversed(0), Tokens(1), ("blocks.0", "blocks.5")).values())


class TestRange:
    norm = nn.BatchNorm2d(3, affine=False, track_running_stats=True).eval()
    norm.running_mean.fill_(0.5)
    norm.running_var.fill_(0.0625)

    def find(self, change):
        x, y = batch(8)
        return findings_of(
            make_at_kd(student_transform=self.norm, teacher_transform=self.norm), change(x), y
        )

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
        assert_only("warning", text, self.find(change))

    def test_networks_without_a_normalisation_take_what_they_get(self):
        x, y = batch(8)
        assert preflight(make_at_kd(), (x - 0.5) * 4, y) == []
        resize = nn.Upsample(scale_factor=2, mode="bilinear")
        assert preflight(make_at_kd(teacher_transform=resize), (x - 0.5) * 4, y) == []

    def test_not_finite(self):
        x, y = batch(8)
        x[0, 0, 0, 0] = torch.nan
        assert (
            "the batch holds values that are not finite" in findings_of(make_at_kd(), x, y)["error"]
        )
