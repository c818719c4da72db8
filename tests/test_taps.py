"""Reading layers, listing stages, pairing them."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import vgg

import attention_transfer as at
from attention_transfer.taps import Tap, unwrap


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, inplace: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.ReLU(inplace))


class Small(nn.Module):
    """Two stages: `one` at full resolution, `two` at half."""

    def __init__(self, width: int = 4, inplace: bool = False):
        super().__init__()
        self.one = conv(3, width, inplace=inplace)
        self.two = conv(width, width, stride=2, inplace=inplace)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.two(self.one(x)).mean((2, 3)))


class Functional(nn.Module):
    """Writes over the output of `layer` with a function that no module announces."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu_(self.layer(x)).mean((2, 3)))


def images(size: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def names(model: nn.Module, size: int = 32) -> list[str]:
    return [s.name for s in at.stages(model, images(size))]


class TestTap:
    def test_output_and_features(self):
        model, x = Small(), images()
        output, features = at.tap(model, ["two", "one"])(x)
        assert list(features) == ["two", "one"]
        torch.testing.assert_close(features["one"], model.one(x))
        torch.testing.assert_close(features["two"], model.two(model.one(x)))
        torch.testing.assert_close(output, model(x))

    def test_gradients_flow_through(self):
        model = Small()
        _, features = at.tap(model, ["one"])(images())
        features["one"].square().sum().backward()
        assert model.one[0].weight.grad.abs().sum() > 0 and model.two[0].weight.grad is None

    def test_a_deep_layer_and_one_named_twice(self):
        _, features = at.tap(Small(), ["one.0", "one.0", "two.1"])(images())
        assert list(features) == ["one.0", "two.1"]

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("example", [True, False])
    def test_an_inplace_relu_after_the_layer(self, training, example):
        model, x = Small(inplace=True).train(training), images()
        tapped = at.tap(model, ["one.0", "two"], x if example else None)
        _, features = tapped(x)
        torch.testing.assert_close(features["one.0"], model.one[0](x))
        assert features["one.0"].min() < 0
        features["one.0"].sum().backward()

    def test_an_example_shows_which_layers_need_no_copy(self):
        model, x = Small(inplace=True), images()
        assert at.tap(model, ["one.0", "two"], x)._reading.copied == {"one.0"}

    def test_a_function_that_writes_in_place(self):
        model, x = Functional(), images()
        expected = model.layer(x)
        torch.testing.assert_close(at.tap(model, ["layer"], x)(x)[1]["layer"], expected)
        with pytest.raises(at.UserError, match="'layer' was changed in place.*example"):
            at.tap(model, ["layer"])(x)

    def test_inplace_dropout_does_nothing_in_the_example(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.9, inplace=True), nn.Flatten())
        x = images()
        expected = model[0](x)
        torch.testing.assert_close(at.tap(model.train(), ["0"], x)(x)[1]["0"], expected)

    @pytest.mark.parametrize("example", [True, False])
    def test_inference_mode(self, example):
        model, x = Functional(), images()
        with torch.inference_mode():
            features = at.tap(model, ["layer"], x if example else None)(x)[1]
            torch.testing.assert_close(features["layer"], model.layer(x))

    def test_a_layer_called_twice(self):
        class Twice(Small):
            def forward(self, x: Tensor) -> Tensor:
                return self.fc(self.two(self.two(self.one(x))).mean((2, 3)))

        with pytest.raises(at.UserError, match="'two' is called more than once"):
            at.tap(Twice(), ["one", "two"])(images())
        at.tap(Twice(), ["one"])(images())

    def test_a_layer_never_called(self):
        model = Small()
        model.idle = nn.Linear(2, 2)
        with pytest.raises(at.UserError, match="'idle' was not called"):
            at.tap(model, ["idle"])(images())

    def test_a_layer_that_puts_out_no_tensor(self):
        class Pair(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return x, x

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.pair = Pair()

            def forward(self, x: Tensor) -> Tensor:
                return self.pair(x)[0]

        with pytest.raises(at.UserError, match="'pair' puts out a tuple, expected a tensor"):
            at.tap(Net(), ["pair"])(images())

    def test_an_unknown_layer(self):
        with pytest.raises(ValueError, match=r"no layer 'group3'; did you mean group\d"):
            at.tap(at.create_model("wrn-10-1", 4), ["group0", "group3"])

    def test_it_works_again_after_a_failed_call(self):
        model = Small()
        tapped = at.tap(model, ["one"])
        with pytest.raises(RuntimeError):
            tapped(torch.ones(2, 7, 8, 8))
        assert tapped(images())[1]["one"].shape == (2, 4, 16, 16)

    def test_plain_calls_between_are_not_captured(self):
        model, x = Small(), images()
        tapped = at.tap(model, ["one"])
        model(2 * x)
        model.one(3 * x)
        torch.testing.assert_close(tapped(x)[1]["one"], model.one(x))
        assert tapped._reading.features == {}

    def test_channels_last(self):
        x = images()
        model = Small()
        expected = at.tap(model, ["two"])(x)[1]["two"]
        model = model.to(memory_format=torch.channels_last)
        got = at.tap(model, ["two"])(x.contiguous(memory_format=torch.channels_last))[1]["two"]
        assert got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, expected)

    def test_hooks_go_with_close_with_block_object_and_failure(self):
        model, x = Small(), images()
        before = hooks(model)
        tapped = at.tap(model, ["one", "two"], x)
        assert hooks(model) == before + 2
        tapped.close()
        assert hooks(model) == before
        with at.tap(model, ["one"]):
            assert hooks(model) == before + 1
        assert hooks(model) == before
        tapped = at.tap(model, ["one"])
        del tapped
        gc.collect()
        assert hooks(model) == before
        with pytest.raises(RuntimeError) as kept:  # which keeps the frames alive, and the tap in them
            at.tap(model, ["one"], x[:, :1])
        assert hooks(model) == before and kept
        at.stages(model, x)
        with pytest.raises(RuntimeError):
            at.stages(model, x[:, :1])
        assert hooks(model) == before

    def test_two_taps_on_one_model(self):
        model, x = Small(), images()
        a, b = at.tap(model, ["one"]), at.tap(model, ["one", "two"])
        assert list(a(x)[1]) == ["one"] and list(b(x)[1]) == ["one", "two"]
        a.close()
        assert list(b(x)[1]) == ["one", "two"]

    def test_modes_are_kept_by_the_example(self):
        model = at.create_model("wrn-10-1", 4)
        model.group1.eval()
        modes = [m.training for m in model.modules()]
        state = copy.deepcopy(model.state_dict())
        at.tap(model, ["group0"], images())
        at.stages(model, images())
        assert [m.training for m in model.modules()] == modes
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())

    @pytest.mark.parametrize("example", [True, False])
    @pytest.mark.parametrize("model", [Small(inplace=True), Functional()], ids=["inplace module", "inplace function"])
    def test_fullgraph(self, model, example):
        x = images()
        first = next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
        expected = model.get_submodule(first)(x)
        tapped = at.tap(model, [first], x if example else None)
        compiled = torch.compile(lambda x: tapped(x), backend="eager", fullgraph=True)
        with torch.no_grad():
            output, features = compiled(x)
            torch.testing.assert_close(features[first], expected)
            torch.testing.assert_close(output, model(x))

    def test_compiled_and_wrapped_models_are_unwrapped(self):
        model, x = Small(), images()
        for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
            assert unwrap(wrapped) is model
            assert Tap(wrapped, ["one"]).model is model
            assert [s.name for s in at.stages(wrapped, x)] == ["one", "two"]
        assert unwrap(torch.compile(nn.DataParallel(model), backend="eager")) is model

    @pytest.mark.parametrize("example", [True, False])
    def test_a_model_or_layer_compiled_in_place_before(self, example):
        """torch does not look for hooks that come after it compiled."""
        torch.compiler.reset()
        whole, layer, x = Small(), Small(), images()
        whole.compile(backend="eager")
        layer.one.compile(backend="eager")
        for model in (whole, layer):
            model(x)
            features = at.tap(model, ["one"], x if example else None)(x)[1]
            torch.testing.assert_close(features["one"], model.one(x))
            assert [s.name for s in at.stages(model, x)] == ["one", "two"]


class Nin(nn.Sequential):
    """As Lin et al.: each block ends in its own pooling, the last in the global one or in none."""

    def __init__(self, bn: bool, last: nn.Module | None):
        def block(inputs: int, outputs: int, kernel: int, pool: nn.Module | None) -> nn.Sequential:
            layers: list[nn.Module] = []
            for i, k in ((inputs, kernel), (8, 1), (8, 1)):
                o = outputs if len(layers) >= 4 + 2 * bn else 8
                layers += [nn.Conv2d(i, o, k, padding=k // 2), *([nn.BatchNorm2d(o)] if bn else []), nn.ReLU(True)]
            return nn.Sequential(*layers, *([pool] if pool else []))

        blocks = [block(3, 8, 5, nn.MaxPool2d(3, 2, 1)), block(8, 8, 5, nn.AvgPool2d(3, 2, 1)), block(8, 10, 3, last)]
        super().__init__(*blocks, *([] if last else [nn.AdaptiveAvgPool2d(1)]), nn.Flatten())


class PreActivation(nn.Module):
    """A block whose shortcut comes from the activated input."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(True)  # called twice
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(x))
        return self.conv2(self.relu(self.bn2(self.conv1(x)))) + self.shortcut(x)


HEAD = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


class TestStages:
    @pytest.mark.parametrize("name", ["wrn-10-1", "wrn-10-2", "wrn-16-1"])
    def test_wrn(self, name):
        width = int(name[-1])
        found = at.stages(at.create_model(name, 10), images(32))
        assert [(s.name, s.shape, s.stride) for s in found] == [
            ("group0", (2, 16 * width, 32, 32), 1),
            ("group1", (2, 32 * width, 16, 16), 2),
            ("group2", (2, 64 * width, 8, 8), 4),
        ]

    @pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/resnet50", "timm/resnet18"])
    def test_resnet(self, name):
        found = at.stages(at.create_model(name, 10), images(64))
        assert [s.name for s in found[-4:]] == ["layer1", "layer2", "layer3", "layer4"]
        assert [s.size for s in found[-4:]] == [(16, 16), (8, 8), (4, 4), (2, 2)]
        assert len(found) == 5 and found[0].size == (32, 32)  # the stem, which is a stage of its own

    def test_small_images_end_early(self):
        assert names(at.create_model("torchvision/resnet18", 10), 32)[-1] == "layer3"  # layer4 puts out 1×1

    @pytest.mark.parametrize(("bn", "last"), [(False, [1, 4, 9, 14, 19]), (True, [2, 6, 13, 20, 27])])
    def test_vgg(self, bn, last):
        """Its convolutions without the head, whose 120 million weights would take a second to draw."""
        model = nn.Sequential(vgg.make_layers(vgg.cfgs["A"], bn), nn.AdaptiveAvgPool2d(1))
        found = names(model, 64)
        assert found[:5] == [f"0.{i}" for i in last]

    @pytest.mark.parametrize("bn", [False, True])
    def test_nin_with_the_pooling_inside_its_blocks(self, bn):
        end = 8 if bn else 5  # the last ReLU before the pooling
        assert names(Nin(bn, None)) == [f"0.{end}", f"1.{end}", "2"]
        assert names(Nin(bn, nn.AdaptiveAvgPool2d(1))) == [f"0.{end}", f"1.{end}", f"2.{end}"]

    def test_nin_with_the_pooling_between_its_blocks(self):
        model = nn.Sequential(
            conv(3, 8, 5), nn.MaxPool2d(3, 2, 1), conv(8, 8, 5), nn.AvgPool2d(3, 2, 1), conv(8, 16), *HEAD
        )
        assert names(model) == ["0", "2", "4"]

    def test_pre_activation_resnet(self):
        def group(i: int, o: int, stride: int) -> nn.Sequential:
            return nn.Sequential(PreActivation(i, o, stride), PreActivation(o, o, 1))

        stem, end = nn.Conv2d(3, 8, 3, 1, 1), (nn.BatchNorm2d(16), nn.ReLU(True), *HEAD)
        assert names(nn.Sequential(stem, group(8, 8, 1), group(8, 16, 2), group(16, 16, 2), *end)) == ["1", "2", "3"]
        flat = (PreActivation(8, 8, 1), PreActivation(8, 16, 2), PreActivation(16, 16, 1), PreActivation(16, 16, 2))
        assert names(nn.Sequential(stem, *flat, *end)) == ["1", "3", "4"]

    def test_the_relu_after_a_plain_convolution_belongs_to_it(self):
        layers = [nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
        assert names(nn.Sequential(*layers, *HEAD)) == ["2", "4"]

    def test_one_relu_and_pool_for_the_whole_network(self):
        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 8, 3, 1, 1)
                self.relu, self.pool, self.fc = nn.ReLU(), nn.MaxPool2d(2), nn.Linear(8, 5)

            def forward(self, x: Tensor) -> Tensor:
                x = self.pool(self.relu(self.a(x)))
                return self.fc(self.relu(self.b(x)).mean((2, 3)))

        model = Shared()
        assert names(model) == ["a", "b"]
        at.tap(model, names(model))(images())

    def test_inside_a_wrapper(self):
        class Wrapper(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.backbone = at.create_model("wrn-10-1", 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.backbone(x)

        assert names(Wrapper()) == ["backbone.group0", "backbone.group1", "backbone.group2"]

    @pytest.mark.parametrize("model", ["timm/mobilenetv3_small_050", "timm/resnetv2_50", "torchvision/mobilenet_v2"])
    def test_every_stage_can_be_tapped(self, model):
        network = at.create_model(model, 4).eval()
        found = at.stages(network, images(64))
        with torch.no_grad():
            _, features = at.tap(network, [s.name for s in found])(images(64))
        assert [tuple(f.shape) for f in features.values()] == [s.shape for s in found]
        strides = [s.stride for s in found]
        assert strides == sorted(strides) and len({s.size for s in found}) == len(found)
        assert all(s.size != (1, 1) for s in found)

    def test_oblong_images(self):
        found = at.stages(Small(), torch.randn(1, 3, 8, 24))
        assert [(s.size, s.stride) for s in found] == [((8, 24), 1), ((4, 12), 2)]

    def test_no_stage(self):
        with pytest.raises(at.UserError, match=r"no stage in Sequential: .*feature map \(N, C, H, W\)"):
            at.stages(nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), images())


class TestPairs:
    def test_wrn(self):
        pairs = at.pair_stages(at.create_model("wrn-10-1", 10), at.create_model("wrn-16-2", 10), images(32))
        assert pairs == [(f"group{g}", f"group{g}") for g in range(3)]

    def test_equal_strides_join_whatever_the_number_of_stages(self):
        deep = nn.Sequential(conv(3, 8), conv(8, 8, stride=2), conv(8, 8, stride=2), conv(8, 16, stride=2), *HEAD)
        assert at.pair_stages(Small(), deep, images(32)) == [("one", "0"), ("two", "1")]
        assert at.pair_stages(deep, Small(), images(32)) == [("0", "one"), ("1", "two")]
        resnet = at.create_model("torchvision/resnet18", 10)
        assert at.pair_stages(at.create_model("wrn-10-1", 10), resnet, images(32)) == [
            ("group1", "relu"),
            ("group2", "layer1"),
        ]

    def test_strides_are_rounded_to_octaves(self):
        unpadded = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 16, 3, 2), nn.ReLU(), *HEAD)  # 30, 14
        assert at.pair_stages(unpadded, Small(), images(32)) == [("1", "one"), ("3", "two")]

    def test_no_pair_shows_both_tables(self):
        far = nn.Sequential(conv(3, 16, stride=8), *HEAD)
        with pytest.raises(at.UserError) as error:
            at.pair_stages(Small(), far, images(32))
        for words in ("one 4×32×32 (stride 1)", "two 4×16×16 (stride 2)", "0 16×4×4 (stride 8)", "pairs=["):
            assert words in str(error.value)
