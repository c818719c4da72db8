"""Figures for notebooks: what they draw, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import attention_transfer as at
from attention_transfer.report.formats import significant


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(self.two(torch.relu(self.one(x)))).mean((2, 3)))


@pytest.fixture
def x():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def texts(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def tiles(figure) -> list[np.ndarray]:
    """The pixels of all tiles; the last one is the colour scale."""
    return [np.asarray(image.get_array()) for image in figure.axes[0].images]


def test_maps_of_all_stages_with_their_ranges(x):
    model = Net()
    figure = at.plot.maps(model, x)
    stages = [stage.name for stage in at.stages(model.eval(), x)]
    assert [text for text in texts(figure) if text in stages] == stages
    # An image and its maps in each row, and the scale.
    assert len(tiles(figure)) == 2 * (1 + len(stages)) + 1
    with at.tap(model, ["two"]) as tapped, torch.no_grad():
        _, features = tapped(x)
    for sample in at.attention_map(features["two"]):
        assert significant(float(sample.max()), 2) in texts(at.plot.maps(model, x, ["two"]))
    assert "maximum (below each map)" in texts(figure)


def test_the_brightest_pixel_is_the_maps_maximum():
    torch.manual_seed(0)
    model = Net().eval()
    x = torch.zeros(1, 3, 16, 16)
    x[:, :, 4, 11] = 5.0  # one clear maximum: smooth drawing moves that of noise
    with at.tap(model, ["one"]) as tapped, torch.no_grad():
        _, features = tapped(x)
    place = at.attention_map(features["one"])[0].argmax().item()
    _, tile = tiles(at.plot.maps(model, x, ["one"], tile=64))[:2]
    brightest = np.unravel_index(tile.astype(int).sum(-1).argmax(), (64, 64))
    assert (brightest[0] // 4, brightest[1] // 4) == divmod(place, 16)


def test_several_networks_side_by_side_and_the_input_gradient(x):
    models = {"teacher": Net(), "student": Net()}
    layers = {"teacher": ["one", "two"], "student": ["two"]}
    figure = at.plot.maps(models, x, layers, kind="gradient", classes=["cat", "dog", "cow"])
    shown = texts(figure)
    for name in ("teacher", "student", "one"):
        assert shown.count(name) == 1
    assert shown.count("input gradient") == 2
    assert len([text for text in shown if text in ("cat", "dog", "cow")]) == 4
    assert len(tiles(figure)) == 2 * (1 + 3 + 2) + 1


def test_layers_of_an_unknown_network(x):
    with pytest.raises(at.UserError, match="layers names the model 'studnet': expected 'student'"):
        at.plot.maps({"student": Net()}, x, {"studnet": ["one"]})


def test_the_network_stays_as_it_was(x):
    model = Net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    at.plot.maps(model, x, kind="gradient")
    assert model.training and model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.one._forward_hooks


def test_normalised_images_are_drawn_over_their_own_range(x):
    figure = at.plot.maps(Net(), (x - 0.5) / 0.2, ["two"])
    image = tiles(figure)[0]
    assert (image.min(), image.max()) == (0, 255)
    figure = at.plot.maps(Net(), (x - 0.5) / 0.2, ["two"], pictures=torch.zeros_like(x))
    assert tiles(figure)[0].max() == 0


def test_a_network_with_preprocessing_inside(student_run, x):
    student = at.load_student(student_run)
    figure = at.plot.maps(student, torch.rand(1, 3, 32, 32), ["group2"])
    assert "group2" in texts(figure)


def test_the_attention_of_a_transformer():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    figure = at.plot.maps(model, torch.rand(1, 3, 32, 32), kind="attention")
    assert "maximum (below each map)" in texts(figure)
    with pytest.raises(at.UserError, match="no feature maps to draw: name its layers"):
        at.plot.maps(Net(), torch.rand(1, 3, 16, 16), kind="attention")


def test_maps_are_upsampled_smoothly():
    """No step between neighbouring pixels of a tile is large."""
    from attention_transfer.report.pictures import resize_map

    values = np.zeros((4, 4), np.float32)
    values[1, 2] = 1.0
    large = resize_map(values, 128, 128)
    assert large.min() == 0 and 0.99 < large.max() <= 1
    steps = np.concatenate([np.abs(np.diff(large, axis=axis)).ravel() for axis in (0, 1)])
    assert steps.max() < 0.06


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.rand(3, 16, 16)}, r"shape \(3, 16, 16\): expected \(N, C, H, W\)"),
        ({"images": "cat.png"}, "images is an object of type str: expected a tensor"),
        ({"models": "wrn-16-1"}, r"expected a torch.nn.Module"),
        ({"models": {}}, "no maps to draw"),
        ({"layers": ["three"]}, "three"),
        ({"kind": "mean"}, "unknown kind 'mean': expected one of sum, max, attention, gradient"),
        ({"p": 0}, "p is 0"),
        ({"pictures": torch.rand(1, 3, 16, 16)}, "expected"),
        ({"pictures": torch.rand(3, 16, 16)}, r"pictures has the shape \(3, 16, 16\)"),
        ({"tile": 0}, "tile is 0: expected a whole number of pixels, at least 8"),
        ({"classes": ["cat"]}, "there are 1 classes for 3 logits"),
        ({"layers": "two"}, "'two'"),
        ({"models": "net"}, "models is 'net'"),
    ],
)
def test_wrong_arguments_of_maps(x, arguments, message):
    with pytest.raises(at.UserError, match=message):
        at.plot.maps(**{"models": Net(), "images": x} | arguments)


def test_a_layer_that_is_named_twice_is_drawn_once(x):
    once, twice = (at.plot.maps(Net(), x, layers=names) for names in (["two"], ["two", "two"]))
    assert len(once.axes[0].images) == len(twice.axes[0].images)
    assert once.get_size_inches().tolist() == twice.get_size_inches().tolist()


def test_convergence_draws_a_line_for_each_setting(teacher_run, student_run):
    figure = at.plot.convergence([teacher_run, student_run])
    (axes,) = figure.axes
    assert axes.get_ylabel() == "validation error, %"
    assert len(axes.lines) == 2
    assert {text.get_text() for text in axes.texts} == {"AT+KD", "WRN-10-1 teacher"}
    for line in axes.lines:
        errors = line.get_ydata()
        assert len(errors) == 2 and 0 <= min(errors) <= max(errors) <= 100


@pytest.mark.parametrize(
    ("metric", "titles"),
    [("loss", ["training", "validation"]), ("parts", ["cross-entropy", "at", "kd"])],
)
def test_convergence_of_losses_and_their_parts(student_run, metric, titles):
    figure = at.plot.convergence(str(student_run), metric)
    assert [axes.get_title(loc="left") for axes in figure.axes][: len(titles)] == titles
    assert all(axes.lines for axes in figure.axes)


def test_wrong_arguments_of_convergence(student_run, tmp_path):
    with pytest.raises(at.UserError, match="unknown metric 'accuracy'"):
        at.plot.convergence(student_run, "accuracy")
    with pytest.raises(at.UserError, match="no run in"):
        at.plot.convergence(tmp_path)
    (tmp_path / "config.yaml").write_text("model: wrn-10-1\n")
    with pytest.raises(at.UserError, match="no epoch is finished"):
        at.plot.convergence(tmp_path)
