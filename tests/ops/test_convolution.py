"""The convolution with a cheap double backward against PyTorch's own, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import close, draw

from attention_transfer.ops.convolution import TwiceDifferentiable, _Convolution

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# dims, channels in and out, kernel, options
CASES = {
    "1d": (1, 4, 6, 3, {}),
    "1d strided": (1, 4, 6, 3, {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}),
    "2d": (2, 4, 6, 3, {}),
    "1×1": (2, 4, 6, 1, {}),
    "padded": (2, 4, 6, 3, {"padding": 1}),
    "strided, with a rest": (2, 4, 6, 3, {"stride": 2, "padding": 1}),
    "1×1 strided": (2, 4, 6, 1, {"stride": (2, 3)}),
    "dilated": (2, 4, 6, 3, {"dilation": 2, "padding": 2}),
    "each side its own": (
        2,
        4,
        6,
        (3, 2),
        {"stride": (1, 2), "padding": (2, 0), "dilation": (1, 2)},
    ),
    "a list of one": (2, 4, 6, 3, {"stride": [2], "padding": [1]}),
    "groups": (2, 4, 6, 3, {"groups": 2, "padding": 1}),
    "depthwise": (2, 4, 4, 3, {"groups": 4, "padding": 1, "stride": 2}),
    "depthwise, two a channel": (2, 4, 8, 3, {"groups": 4}),
    "same": (2, 4, 6, 3, {"padding": "same"}),
    "valid": (2, 4, 6, 3, {"padding": "valid"}),
    "3d": (3, 2, 4, 2, {"stride": 2, "padding": 1}),
}


def tensors(dims, inputs, outputs, kernel, options, bias=True):
    kernel = kernel if isinstance(kernel, tuple) else (kernel,) * dims
    w = draw(outputs, inputs // options.get("groups", 1), *kernel, seed=1)
    x = draw(3, inputs, *(8, 7, 5)[:dims], seed=2)
    return [t.requires_grad_() for t in (x, w, *([draw(outputs, seed=3)] if bias else []))]


def first_and_second(function, given, inputs_only):
    """(value, first gradients, J, gradients through J) of a loss with a curvature of its own.

    By the block, J is taken in a pass of inputs alone; without it, in an ordinary one.
    """
    mode = TwiceDifferentiable()
    if inputs_only:
        with mode:
            y = function(*given)
    else:
        y = function(*given)
    loss = (y * draw(*y.shape, seed=4)).tanh().sum()
    first = torch.autograd.grad(loss, given, retain_graph=True)
    mode.inputs_only = True
    (j,) = torch.autograd.grad(loss, given[0], create_graph=True)
    mode.inputs_only = False
    second = torch.autograd.grad((j * draw(*j.shape, seed=5)).sin().sum(), given)
    return y, first, j, second


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_against_pytorch(case, bias):
    dims, *sizes, options = CASES[case]
    given = tensors(dims, *sizes, options, bias)

    def convolve(*given):
        return CONVOLUTIONS[dims](*given, **options)

    found, expected = (first_and_second(convolve, given, own) for own in (True, False))
    names = {type(node[0]).__name__ for node in found[0].grad_fn.next_functions} | {
        type(found[0].grad_fn).__name__
    }
    assert ("_ConvolutionBackward" in names) == (not isinstance(options.get("padding"), str))
    close(found[0], expected[0], 1e-12)
    close(found[2], expected[2], 1e-12)
    for a, b in zip((*found[1], *found[3]), (*expected[1], *expected[3]), strict=True):
        assert a.shape == b.shape and b.abs().sum() > 0
        close(a, b, 1e-12)


@pytest.mark.parametrize("case", ["1d strided", "each side its own", "depthwise"])
def test_gradgradcheck(case):
    dims, inputs, outputs, kernel, options = CASES[case]
    x, w, b = tensors(dims, inputs, outputs, kernel, options)
    mode = TwiceDifferentiable()

    def convolve(x, w, b):
        with mode:
            return CONVOLUTIONS[dims](x, w, b, **options)

    assert torch.autograd.gradcheck(convolve, (x, w, b))
    assert torch.autograd.gradgradcheck(convolve, (x, w, b))  # with graph, and not of inputs alone

    def input_gradient(g, x, w):
        y = convolve(x, w, None)
        mode.inputs_only = True
        (j,) = torch.autograd.grad(y, x, g, create_graph=True)
        mode.inputs_only = False
        return j

    g = torch.randn_like(convolve(x, w, b)).requires_grad_()
    assert torch.autograd.gradcheck(input_gradient, (g, x, w))


class Small(nn.Module):
    """Strided, pooled, with a circular convolution and a functional call."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 6, 3, 2, 1)
        self.two = nn.Conv2d(6, 6, 3, 1, 1, groups=2, bias=False, padding_mode="circular")
        self.weight = nn.Parameter(torch.randn(8, 6, 1, 1) / 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = F.max_pool2d(self.one(x).relu(), 2)
        return self.fc(F.conv2d(input=self.two(x).tanh(), weight=self.weight).mean((2, 3)))


def penalty(model, x, own):
    """The gradients of ½‖J‖² + loss with respect to the weights."""
    mode = TwiceDifferentiable()
    x = x.detach().requires_grad_()
    if own:
        with mode:
            y = model(x)
    else:
        y = model(x)
    loss = y.to(x.dtype).square().sum()
    mode.inputs_only = own
    (j,) = torch.autograd.grad(loss, x, create_graph=True)
    mode.inputs_only = False
    return torch.autograd.grad(j.square().sum() / 2 + loss, tuple(model.parameters())), j, y


def make_small(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small().to(dtype)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_in_a_network(layout):
    model, x = (
        make_small().to(memory_format=layout),
        draw(5, 3, 16, 16).contiguous(memory_format=layout),
    )
    found, j, y = penalty(model, x, True)
    expected, k, z = penalty(model, x, False)
    close(y, z, 1e-12)
    close(j, k, 1e-12)
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-12)
    with TwiceDifferentiable():
        assert model.one(x).is_contiguous(memory_format=layout)


def test_bfloat16_autocast():
    """As far from float32 as PyTorch's own bfloat16 is."""
    model, x = make_small(torch.float32), draw(5, 3, 16, 16, dtype=torch.float32)
    exact = penalty(model, x, False)[0]
    with torch.autocast("cpu", torch.bfloat16):
        with TwiceDifferentiable():
            assert F.conv2d(x, model.one.weight, model.one.bias).dtype == torch.bfloat16
            assert F.conv2d(x.double(), model.one.weight.double()).dtype == torch.float64
            assert model.one(x.half()).dtype == torch.bfloat16
        found, theirs = penalty(model, x, True)[0], penalty(model, x, False)[0]
    for a, b, c in zip(found, theirs, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - c).norm() < max(1.5 * (b - c).norm(), 0.02 * c.norm())


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_users_own_graph_has_the_weights():
    """Outside a pass for inputs alone, create_graph=True gives every gradient its graph."""
    model, x = make_small(), draw(2, 3, 16, 16)
    found = []
    for own in (True, False):
        model.zero_grad()
        if own:
            with TwiceDifferentiable():
                loss = model(x).square().sum()
        else:
            loss = model(x).square().sum()
        loss.backward(create_graph=True)
        gradients = [p.grad for p in model.parameters()]
        assert all(g is not None for g in gradients)
        norm = sum(g.square().sum() for g in gradients)
        found.append(
            [
                *(g.detach() for g in gradients),
                *torch.autograd.grad(norm, tuple(model.parameters())),
            ]
        )
        model.zero_grad()  # a gradient with a graph to its own weight
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-12)


def test_a_weight_that_is_computed_from_the_input():
    """A dynamic convolution: the input's gradient goes through the weight and the bias too."""
    experts, x = draw(2, 6, 3, 3, 3).requires_grad_(), draw(1, 3, 8, 8, seed=1)

    def dynamic(x, experts):
        routed = x.mean((2, 3)).softmax(1)[0]
        return F.conv2d(
            x,
            torch.einsum("e,eoikl->oikl", routed[:2], experts),
            experts.flatten(2).sum((0, 2)) * routed[2],
        )

    found, expected = (
        first_and_second(dynamic, [x.requires_grad_(), experts], own) for own in (True, False)
    )
    close(found[2], expected[2], 1e-12)
    for a, b in zip(found[3], expected[3], strict=True):
        close(a, b, 1e-12)


def test_standardised_weights():
    w, x = draw(6, 3, 3, 3).requires_grad_(), draw(2, 3, 8, 8, seed=1).requires_grad_()

    def standardised(x, w):
        return F.conv2d(x, (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True))

    found, expected = (first_and_second(standardised, [x, w], own) for own in (True, False))
    for a, b in zip(found[3], expected[3], strict=True):
        close(a, b, 1e-12)


def test_what_it_leaves_to_pytorch():
    w, x = draw(4, 3, 3, 3), draw(2, 3, 8, 8).requires_grad_()
    with TwiceDifferentiable():
        assert F.conv2d(x[0], w).shape == (4, 6, 6)  # no batch
        assert F.conv2d(x, w, padding="same").shape == (2, 4, 8, 8)
        complex_ = F.conv2d(x + 0j, w + 0j)
    torch.testing.assert_close(complex_.real, F.conv2d(x, w))
    with pytest.raises(RuntimeError, match="expected input"), TwiceDifferentiable():
        F.conv2d(x[:, :2], w)


def test_nothing_stays_patched():
    before = (
        F.conv2d,
        torch.conv2d,
        nn.functional.conv2d,
        nn.Conv2d.forward,
        nn.Conv2d._conv_forward,
    )
    w, x = draw(4, 3, 3, 3), draw(2, 3, 8, 8).requires_grad_()
    with TwiceDifferentiable():
        assert isinstance(F.conv2d(x, w).grad_fn, _Convolution._backward_cls)
    assert before == (
        F.conv2d,
        torch.conv2d,
        nn.functional.conv2d,
        nn.Conv2d.forward,
        nn.Conv2d._conv_forward,
    )
    assert type(F.conv2d(x, w).grad_fn).__name__ == "ConvolutionBackward0"
    with pytest.raises(ZeroDivisionError), TwiceDifferentiable():
        1 / 0  # noqa: B018
    assert type(F.conv2d(x, w).grad_fn).__name__ == "ConvolutionBackward0"
