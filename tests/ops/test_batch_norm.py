"""The compiled runs' batch normalisation against `nn.BatchNorm2d` in float64."""

import copy
import pickle

import pytest
import torch
from torch import nn

from attention_transfer.ops import batch_norm


def run(module, x, g):
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(g)
    gradients = x.grad, module.weight.grad, module.bias.grad
    return [
        tensor.detach().double()
        for tensor in (y, *gradients, module.running_mean, module.running_var)
    ]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (4, 16, 1, 1), (2, 20, 7, 7)])
def test_values_gradients_and_running_statistics(dtype, tolerance, offset, shape):
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(shape[1]).double()
    nn.init.uniform_(plain.weight, 0.5, 1.5)
    nn.init.normal_(plain.bias)
    x = (torch.randn(shape, dtype=torch.float64) + offset).to(dtype)
    g = torch.randn(shape, dtype=torch.float64).to(dtype)
    ours = copy.deepcopy(plain)
    if dtype != torch.float64:
        ours.float()
    assert batch_norm.use_in(ours) == 1
    expected = run(plain, x.double(), g.double())
    actual = run(ours, x.to(memory_format=torch.channels_last), g)
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1) * (4 if offset else 1)
    assert ours.num_batches_tracked == plain.num_batches_tracked == 1
    assert ours.state_dict().keys() == plain.state_dict().keys()


def test_gradcheck():
    torch.manual_seed(0)
    x = torch.randn(3, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    w, b = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *a: batch_norm.BatchNorm.apply(*a, 1e-5)[0], (x, w, b))


def test_evaluation_and_special_modules_are_left_alone():
    torch.manual_seed(0)
    layers = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.BatchNorm1d(4)
    model = nn.Sequential(*layers).eval()
    x = torch.randn(2, 4, 3, 3)
    before = model[0](x)
    assert batch_norm.use_in(model) == 1
    assert torch.equal(model[0](x), before)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model[0].train()(torch.randn(1, 4, 1, 1))


def test_it_can_be_copied_and_pickled():
    model = nn.Sequential(nn.BatchNorm2d(4))
    batch_norm.use_in(model)
    x = torch.randn(2, 4, 3, 3)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in copies:
        assert torch.equal(other(x), copy.deepcopy(model)(x))
