"""Loaded networks take images in [0, 1]; taps, stages and `Transfer` see through the wrapper."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from toys import close

import attention_transfer as at
from attention_transfer.models.trained import Preprocess, TrainedNetwork

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
GROUPS = ["group0", "group1", "group2"]


def trained(name="wrn-10-1", size=16, seed=0):
    torch.manual_seed(seed)
    network = at.create_model(name, 3).eval()
    return TrainedNetwork(network, Preprocess(MEAN, STD, (size, size)), ("cat", "dog", "emu"))


def images(size=16):
    return torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_the_preprocessing_is_inside():
    model, x = trained(), images()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    close(model(x), model.network((x - mean) / std), 1e-6)
    assert model(images(24)).shape == (4, 3)  # resized
    assert not model.training and not model.preprocess.training
    assert set(model.state_dict()) == {f"network.{key}" for key in model.network.state_dict()}


def test_the_repr_names_the_input():
    text = repr(trained())
    for words in (
        "images (N, 3, 16, 16), RGB, in [0, 1]",
        "logits (N, 3): cat, dog, emu",
        "mean (0.5, 0.4, 0.3), std (0.2, 0.25, 0.3)",
        "resized to 16×16",
    ):
        assert words in text


class TestRange:
    @pytest.mark.parametrize("change", [lambda x: (x - 0.5) / 0.2, lambda x: 255 * x])
    def test_a_warning_once(self, change):
        model, x = trained(), change(images())
        with pytest.warns(UserWarning, match=r"expected \[0, 1\]; the network normalises"):
            model(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x)

    def test_none_in_range(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trained()(images())
            trained()(1.2 * images() - 0.1)  # as a bicubic filter leaves them
            torch.func.vmap(trained())(images()[None])
            trained().to("meta")(images().to("meta"))

    def test_uint8(self):
        with pytest.raises(at.UserError, match="images are torch.uint8: expected floating point"):
            trained()(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


class TestTaps:
    def test_the_networks_own_layers(self):
        model, x = trained(), images()
        logits, features = at.tap(model, GROUPS)(x)
        expected_logits, expected = at.tap(model.network, GROUPS)(model.preprocess(x))
        close(logits, expected_logits)
        for group in GROUPS:
            close(features[group], expected[group])
        with pytest.raises(at.UserError, match="no layer 'network.group0'; did you mean group0"):
            at.tap(model, ["network.group0"])

    def test_a_copied_tap(self):
        tap, x = at.tap(trained(), GROUPS), images()
        close(copy.deepcopy(tap)(x)[0], tap(x)[0])

    def test_stages_at_its_own_size(self):
        found = at.stages(trained(size=16), images(32))
        assert [(stage.name, stage.size, stage.stride) for stage in found] == [
            ("group0", (16, 16), 1),
            ("group1", (8, 8), 2),
            ("group2", (4, 4), 4),
        ]
        pairs = at.pair_stages(trained(size=16), trained("wrn-10-2", size=32), images(32))
        assert pairs == [(group, group) for group in GROUPS]

    @pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel, copy.deepcopy])
    def test_wrapped(self, wrap):
        assert [stage.name for stage in at.stages(wrap(trained()), images())] == GROUPS


class TestTransfer:
    def test_as_with_the_networks_and_transforms(self):
        student, teacher = trained(), trained("wrn-10-2", size=32, seed=1)
        x, y = images(), torch.tensor([0, 1, 2, 0])
        methods = [at.ActivationTransfer(beta=10.0), at.KnowledgeDistillation()]
        methods.append(at.GradientTransfer(beta=1.0))
        found = at.Transfer(student, teacher, methods, example=x)
        expected = at.Transfer(
            copy.deepcopy(student.network),
            teacher.network,
            methods,
            example=x,
            student_transform=student.preprocess,
            teacher_transform=teacher.preprocess,
        )
        assert found.pairs == expected.pairs == [(group, group) for group in GROUPS]
        close(found(x, y).loss, expected(x, y).loss)

    def test_what_was_loaded_is_trained(self):
        student, x = trained(), images()
        before = student(x)
        named = [("group2", "group2")]
        transfer = at.Transfer(student, trained(seed=1), [at.ActivationTransfer()], named, x)
        optimizer = torch.optim.SGD(transfer.trainable_parameters(), 0.1)
        transfer(x, torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        assert transfer.student is student.network
        assert not torch.equal(student(x), before)

    @pytest.mark.parametrize("role", ["student", "teacher"])
    def test_a_transform_of_ones_own(self, role):
        own = {f"{role}_transform": torch.nn.Identity()}
        with pytest.raises(at.UserError, match=f"the {role} has its preprocessing inside"):
            at.Transfer(trained(), trained(), [at.ActivationTransfer()], example=images(), **own)

    def test_weights_of_its_state_dict(self, tmp_path):
        """Names that all begin with `network.` load into the network alone."""
        from attention_transfer.models.weights import load_weights

        model, other = trained(), at.create_model("wrn-10-1", 3).eval()
        torch.save(model.state_dict(), tmp_path / "w.pt")
        load_weights(other, tmp_path / "w.pt")
        close(other(images()), model.network(images()))
