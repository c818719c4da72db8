"""Reading layers."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tapped import Functional, Small, hooks, images
from torch import Tensor, nn

import attention_transfer as at
from attention_transfer.taps import Tap, unwrap


class Structured(nn.Module):
    """A layer that returns what `make` makes of its features; the network ignores it."""

    class Layer(nn.Module):
        def __init__(self, make: Callable[[Tensor], Any]):
            super().__init__()
            self.conv, self.make = nn.Conv2d(3, 4, 3, padding=1), make

        def forward(self, x: Tensor) -> Any:
            return self.make(self.conv(x))

    def __init__(self, make: Callable[[Tensor], Any]):
        super().__init__()
        self.layer = self.Layer(make)

    def forward(self, x: Tensor) -> Tensor:
        self.layer(x)
        return x.mean((2, 3))


class Training(nn.Module):
    """Changes the output of `layer` by `write` in training mode only."""

    def __init__(self, write: Callable[[Tensor], Any]):
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if self.training:
            self.write(h)
        return self.norm(h).mean((2, 3))


WRITES = {
    "dropout": lambda h: F.dropout(h, 0.5, inplace=True),
    "+=": lambda h: h.add_(1),
    "relu": nn.ReLU(inplace=True),
}


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
        assert at.tap(model, ["one.0", "two"], x)._state.copies.layers == {"one.0"}

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

    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("write", WRITES)
    def test_a_write_in_training_mode_only(self, write, compiled):
        torch.compiler.reset()
        model, x = Training(WRITES[write]), images()
        expected = model.layer(x)
        state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        tapped = at.tap(model.train(), ["layer"], x)
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert hooks(model) == 1
        call = torch.compile(tapped, backend="aot_eager") if compiled else tapped
        torch.testing.assert_close(call(x)[1]["layer"], expected)

    def test_a_compiled_write_that_the_example_has_not(self):
        """Eager mode refuses it; a compiled graph takes a copy, whatever the example was."""
        torch.compiler.reset()
        model, x = Training(lambda h: F.dropout(h, model.rate, inplace=True)), images()
        model.rate = 0.0
        tapped = at.tap(model, ["layer"], x)
        model.rate = 0.5
        expected = model.layer(x)
        compiled = torch.compile(tapped, backend="aot_eager")
        torch.testing.assert_close(compiled(x)[1]["layer"], expected)
        with pytest.raises(at.UserError, match="'layer' was changed in place .*: replace the oper"):
            tapped(x)

    def test_a_model_that_cannot_be_trained_on_the_example(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.BatchNorm1d(784))
        x = images(batch=1)
        torch.testing.assert_close(at.tap(model, ["0"], x).model[0](x), model[0](x))
        assert model.training and not model[2].num_batches_tracked

    @pytest.mark.parametrize("compiled", [False, True])
    def test_threads_do_not_share_their_batches(self, compiled):
        torch.compiler.reset()
        model = Small()
        tapped = at.tap(model, ["one", "two"])
        call = torch.compile(tapped, backend="eager") if compiled else tapped
        batches = [k * images() for k in range(1, 9)]
        for _ in range(4):
            with ThreadPoolExecutor(4) as pool:
                results = list(pool.map(call, batches))
            for x, (output, features) in zip(batches, results, strict=True):
                torch.testing.assert_close(features["one"], model.one(x))
                torch.testing.assert_close(features["two"], model.two(model.one(x)))
                torch.testing.assert_close(output, model(x))

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

    def test_the_one_feature_map_of_a_tuple_or_dict(self):
        """Logits, a class token, sizes and the same tensor again are no second feature map."""
        x = images()
        for make in (
            lambda f: (f, f.mean((2, 3))),
            lambda f: [f.flatten(2).mean(2)[:, None], f, [16, 16]],
            lambda f: {"state": f, "again": f, "none": None},
            lambda f: (((f,), {"deep": f.sum()}),),
        ):
            model = Structured(make)
            torch.testing.assert_close(
                at.tap(model, ["layer"], x)(x)[1]["layer"], model.layer.conv(x)
            )

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (
                lambda f: (f, 2 * f),
                r"a tuple with 2 feature maps \(\[0\] \(2, 4, 16, 16\), \[1\] \(2, 4, 16, 16\)\)",
            ),
            (
                lambda f: {"a": f.mean(), "b": [f[:1]]},
                r"a dict with no feature maps \(\['a'\] \(\), \['b'\]\[0\] \(1, 4",
            ),
            (lambda f: (16, None), "a tuple without tensors"),
            (lambda f: None, "a NoneType without tensors"),
        ],
    )
    def test_none_or_several_in_a_tuple_or_dict(self, make, words):
        with pytest.raises(at.UserError, match=f"'layer' returns {words}.*expected"):
            at.tap(Structured(make), ["layer"])(images())

    def test_a_layer_under_two_names(self):
        model = Small()
        model.alias = model.one
        torch.testing.assert_close(
            at.tap(model, ["alias"])(images())[1]["alias"], model.one(images())
        )

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
        assert tapped._state.features == {}

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
        # The traceback keeps the frames alive, and the tap in them.
        with pytest.raises(RuntimeError) as kept:
            at.tap(model, ["one"], x[:, :1])
        assert hooks(model) == before and kept
        at.stages(model, x)
        with pytest.raises(RuntimeError):
            at.stages(model, x[:, :1])
        assert hooks(model) == before

    def test_a_tapped_model_can_be_copied_after_a_failed_call(self):
        model, x = Small(), images()
        tapped = at.tap(model, ["one"], x)
        model.fc = nn.Linear(1, 1)
        with pytest.raises(RuntimeError):
            tapped(x)
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin.one(x), model.one(x))

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))]
    )
    def test_copies(self, copied):
        """A copied tap reads its copied model; a model that is copied alone is read by none."""
        model, x = Small(inplace=True), images()
        before = hooks(model)
        tapped = at.tap(model, ["one.0", "two"], x)
        alone = copied(model)
        twin = copied(tapped)
        expected = tapped(x)[1]
        assert twin.model is not model and hooks(twin.model) == before + 2
        assert twin._state.copies.layers == {"one.0"}
        model.one[0].weight.data.zero_()
        for other in (twin, at.tap(alone, ["one.0", "two"], x)):
            for layer, features in other(x)[1].items():
                torch.testing.assert_close(features, expected[layer])
        tapped.close()
        assert hooks(twin.model) == before + 2
        model = twin.model
        twin.close()
        assert hooks(model) == hooks(copied(twin).model) == before

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
    @pytest.mark.parametrize(
        "model", [Small(inplace=True), Functional()], ids=["inplace module", "inplace function"]
    )
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


class Tokens(nn.Module):
    """Patches of 4 as tokens behind `prefix` others, two blocks; says nothing of itself."""

    def __init__(self, prefix: int, width: int = 6):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.extra = nn.Parameter(torch.randn(1, prefix, width))
        self.block, self.last = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat(
            [self.extra.expand(len(x), -1, -1), self.patches(x).flatten(2).transpose(1, 2)], 1
        )
        return self.last(self.block(tokens))[:, 0]


class ChannelsLast(nn.Module):
    """(N, h, w, C) inside, as Swin."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.patches, self.block = nn.Conv2d(3, width, 4, 4), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.patches(x).permute(0, 2, 3, 1)).mean((1, 2))


class TestLayouts:
    """Features come as (N, C, H, W) or (N, L, D), whatever the order of axes in the network."""

    @pytest.mark.parametrize("example", [True, False])
    @pytest.mark.parametrize("prefix", [0, 1, 2, 5])
    def test_tokens_lose_their_prefix(self, prefix, example):
        model, x = Tokens(prefix), images(32)
        expected = model.block(model.patches(x).flatten(2).transpose(1, 2))
        features = at.tap(model, ["block"], x if example else None)(x)[1]["block"]
        assert features.shape == (2, 64, 6)
        torch.testing.assert_close(features, expected)

    @pytest.mark.parametrize("example", [True, False])
    @pytest.mark.parametrize("size", [(16, 32), (32, 16), (20, 12)])
    def test_tokens_of_another_grid_come_with_it(self, size, example):
        model, x = Tokens(1), torch.randn(2, 3, *size)
        grid = model.patches(x)
        features = at.tap(model, ["block"], x if example else None)(x)[1]["block"]
        assert features.shape == (2, 6, size[0] // 4, size[1] // 4)
        expected = model.block(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(features, expected)

    def test_another_size_than_the_examples(self):
        model = Tokens(1)
        tapped = at.tap(model, ["block"], images(32))
        assert tapped(torch.randn(2, 3, 16, 32))[1]["block"].shape == (2, 6, 4, 8)
        assert tapped(images(16))[1]["block"].shape == (2, 16, 6)

    # At 24×24 the output is a cube, 6×6×6.
    @pytest.mark.parametrize("size", [(32, 32), (16, 40), (24, 24)])
    def test_channels_last(self, size):
        model, x = ChannelsLast(), torch.randn(2, 3, *size)
        features = at.tap(model, ["block", "patches"])(x)[1]
        assert (
            features["block"].shape
            == features["patches"].shape
            == (2, 6, size[0] // 4, size[1] // 4)
        )
        expected = model.block(features["patches"].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(features["block"], expected)

    def test_a_cube_of_a_convolution(self):
        model, x = (
            nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten()),
            images(16),
        )
        torch.testing.assert_close(at.tap(model, ["2"])(x)[1]["2"], model[2](model[1](model[0](x))))

    def test_maps_with_other_proportions_than_the_image(self):
        model, x = (
            nn.Sequential(nn.Conv2d(3, 8, 3, (4, 1), 1), nn.Flatten()),
            torch.randn(2, 3, 32, 64),
        )
        torch.testing.assert_close(at.tap(model, ["0"])(x)[1]["0"], model[0](x))

    def test_a_sequence_is_no_grid(self):
        """26 steps of a text line of 32×100: no stride makes a grid of them."""

        class Columns(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.fc = nn.Conv2d(3, 4, (32, 4), (32, 4), (0, 2)), nn.Linear(4, 5)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(self.conv(x)[:, :, 0].mT)

        model, x = Columns(), torch.randn(2, 3, 32, 100)
        features = at.tap(model, ["fc"])(x)[1]["fc"]
        assert features.shape == (2, 26, 5)
        torch.testing.assert_close(features, model(x))

    def test_gradients_reach_through_the_views(self):
        for model in (Tokens(2), ChannelsLast()):
            at.tap(model, ["block"])(torch.randn(2, 3, 16, 32))[1][
                "block"
            ].square().sum().backward()
            assert model.block.weight.grad.abs().sum() > 0

    @pytest.mark.parametrize("example", [True, False])
    @pytest.mark.parametrize("model", [Tokens(1), ChannelsLast()], ids=["tokens", "channels last"])
    @pytest.mark.parametrize("size", [(32, 32), (16, 32)])
    def test_fullgraph_and_torch_func(self, model, example, size):
        torch.compiler.reset()
        x = torch.randn(2, 3, *size)
        tapped = at.tap(model, ["block"], x if example else None)
        expected = tapped(x)[1]["block"]

        def loss(x: Tensor) -> tuple[Tensor, Tensor]:
            _, features = tapped(x)
            return features["block"].square().sum(), features["block"]

        tangent = torch.func.jvp(loss, (x,), (torch.ones_like(x),), has_aux=True)
        gradient, features = torch.func.grad(loss, has_aux=True)(x)
        torch.testing.assert_close(features, expected)
        torch.testing.assert_close(tangent[1], gradient.sum(), rtol=1e-4, atol=1e-4)
        compiled = torch.compile(lambda x: tapped(x)[1]["block"], backend="eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), expected)
            torch.testing.assert_close(compiled(x[:1]), expected[:1])
