"""Network in network: its sizes, its layers, and where it is read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import close

import attention_transfer as at

WIDTHS = {
    "nin-wide": [(192, 160, 96), (192, 192, 192), (192, 192, 10)],
    "nin-thin": [(86, 72, 43), (86, 86, 86), (86, 86, 10)],
}
COUNTS = {"nin-wide": 966_986, "nin-thin": 198_441}
nets = pytest.mark.parametrize("name", WIDTHS)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def of(model, kind):
    return [m for m in model.modules() if type(m) is kind]


@nets
def test_sizes(name):
    plain, normalised = at.create_model(f"{name}-no-bn", 10), at.create_model(name, 10)
    widths = sum(WIDTHS[name], ())
    assert parameters(plain) == COUNTS[name]
    assert parameters(normalised) == COUNTS[name] + 2 * sum(widths)
    assert not of(plain, nn.BatchNorm2d) and [
        m.num_features for m in of(normalised, nn.BatchNorm2d)
    ] == [*widths]


@nets
@pytest.mark.parametrize("suffix", ["", "-no-bn"])
def test_layers(name, suffix):
    model = at.create_model(name + suffix, 10)
    convolutions = of(model, nn.Conv2d)
    assert [c.out_channels for c in convolutions] == [w for block in WIDTHS[name] for w in block]
    assert [c.kernel_size for c in convolutions] == [
        (k, k) for block in (5, 5, 3) for k in (block, 1, 1)
    ]
    assert all(
        c.stride == (1, 1) and c.padding == (c.kernel_size[0] // 2,) * 2 for c in convolutions
    )
    assert all((c.bias == 0).all() for c in convolutions)
    assert len(of(model, nn.ReLU)) == 8 and not of(model, nn.Linear) and not of(model, nn.Dropout)
    (highest,), (average,) = of(model, nn.MaxPool2d), of(model, nn.AvgPool2d)
    assert (highest.kernel_size, highest.stride, highest.padding) == (3, 2, 1)
    assert (average.kernel_size, average.stride, average.padding) == (3, 2, 1)
    assert [n for n, _ in model.named_children()] == [
        "block0",
        "pool0",
        "block1",
        "pool1",
        "block2",
    ]


@nets
@pytest.mark.parametrize("suffix", ["", "-no-bn"])
def test_stages(name, suffix):
    """At the end of each block, before its pooling."""
    found = at.stages(at.create_model(name + suffix, 10), torch.rand(2, 3, 32, 32))
    last = [block[-1] for block in WIDTHS[name]]
    assert [(s.name, s.shape) for s in found] == [
        ("block0", (2, last[0], 32, 32)),
        ("block1", (2, last[1], 16, 16)),
        ("block2", (2, last[2], 8, 8)),
    ]


def test_pairs_of_thin_and_wide():
    thin, wide = at.create_model("nin-thin-no-bn", 10), at.create_model("nin-wide", 10)
    assert at.pair_stages(thin, wide, torch.rand(1, 3, 32, 32)) == [
        (f"block{i}", f"block{i}") for i in range(3)
    ]


def test_forward_by_hand():
    model = at.create_model("nin-thin-no-bn", 7).double()
    x = torch.rand(2, 3, 17, 32, dtype=torch.float64)
    w = iter(model.parameters())

    def convolve(x, padding=0):
        return F.conv2d(x, next(w), next(w), padding=padding)

    def block(x, padding):
        return convolve(convolve(convolve(x, padding).relu()).relu())

    expected = F.max_pool2d(block(x, 2).relu(), 3, 2, 1)
    expected = F.avg_pool2d(block(expected, 2).relu(), 3, 2, 1)
    expected = block(expected, 1)  # logits, which may be negative
    close(model(x), expected.mean((2, 3)))
    assert model(x).shape == (2, 7) and (model(x) < 0).any()


def test_signal_reaches_the_end_without_batch_normalisation():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = at.create_model("nin-wide-no-bn", 10), torch.randn(4, 3, 32, 32)
        _, features = at.tap(model, ["block0", "block1", "block2"])(x)
    assert all(0.2 < f.std() < 5 for f in features.values())
