"""Folding changes no value, against float64, and leaves alone whatever would not fold exactly."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attention_transfer as at
from attention_transfer.bench.fold import fold_batch_norms, foldable

X = torch.rand(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def lively(model):
    """Statistics, weights and biases that are none of 0 and 1."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                if tensor is not None:
                    nn.init.normal_(tensor, 0, 0.3)
            for tensor in (module.running_var, module.weight):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 2)
    return model.double().eval()


def values(model, layers=()):
    with torch.no_grad():
        if not layers:
            return [model(X)]
        with at.tap(model, layers, X) as tapped:
            logits, features = tapped(X)
    return [logits, *features.values()]


def check(model, expected, layers=()):
    model = lively(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded, names = fold_batch_norms(model, X, layers)
    assert names == expected
    for a, b in zip(values(model, layers), values(folded, layers), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)
    assert not any(isinstance(folded.get_submodule(n), nn.BatchNorm2d) for n in names)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    return folded


@pytest.mark.parametrize("width", [1, 2])
def test_wrn_folds_what_follows_a_convolution_and_no_more(width):
    net = at.create_model(f"wrn-16-{width}", 10)
    blocks = [name for name, _ in net.named_modules() if name.count(".") == 1]
    assert len(blocks) == 6
    expected = [f"{block}.bn1" for block in blocks]
    if width > 1:  # the first block's shortcut is then fed by its bn0, and the stem by nothing else
        expected = [f"{blocks[0]}.bn0", *expected]
    check(net, expected, ["group0", "group1", "group2"])


@pytest.mark.parametrize(
    "name", ["timm/resnet10t", "timm/regnetx_002", "timm/mobilenetv3_small_050"]
)
def test_networks_of_timm(name):
    model = at.create_model(name, 10)
    layers = [s.name for s in at.stages(model, X.float())]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    folded, names = fold_batch_norms(lively(model), X, layers)
    assert len(names) == len(norms)  # in these every one follows a convolution
    for a, b in zip(values(model, layers), values(folded, layers), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


def test_input_gradients_are_the_same():
    model = lively(at.create_model("wrn-10-1", 10))
    folded, _ = fold_batch_norms(model, X)
    y = torch.tensor([1, 2])
    torch.testing.assert_close(
        at.input_gradient(folded, X, y), at.input_gradient(model, X, y), rtol=1e-9, atol=1e-12
    )


class Net(nn.Module):
    """conv, bn; what happens in between is `way`."""

    def __init__(self, way="plain", **norm):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
        self.bn = nn.BatchNorm2d(4, **norm)
        self.way = way

    def forward(self, x):
        z = self.conv(x)
        if self.way == "both":
            return F.relu(self.bn(z)) + z
        if self.way == "twice":
            return self.bn(self.conv(x + z[:, :3]))
        if self.way == "norm twice":
            return self.bn(self.bn(z))
        if self.way == "in between":
            return self.bn(z.mul_(2))
        if self.way == "returned":
            return {"out": self.bn(z), "raw": z}["out"], z
        if self.way == "reads":
            return self.bn(z) * self.bn.weight.mean()
        if self.way == "functional":
            return F.batch_norm(
                z, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias
            )
        return self.bn(z)


@pytest.mark.parametrize("norm", [{}, {"affine": False}, {"eps": 0.1}])
def test_a_pair_folds(norm):
    check(Net(**norm), ["bn"])


@pytest.mark.parametrize("way", ["both", "twice", "norm twice", "in between", "functional"])
def test_other_uses_of_the_output_keep_it(way):
    check(Net(way), [])


def test_an_output_that_is_returned_or_tapped_is_kept():
    assert foldable(lively(Net("returned")), X) == []
    assert foldable(lively(Net()), X, ["conv"]) == []
    check(Net(), ["bn"], ["bn"])


def test_a_network_that_reads_the_layer_is_left_as_it_was():
    assert foldable(lively(Net("reads")), X) == [("conv", "bn")]
    check(Net("reads"), [])


def test_hooks_sharing_and_statistics_of_the_batch_are_left_alone():
    hooked = Net()
    hooked.conv.register_forward_hook(lambda m, a, out: out * 2)
    check(hooked, [])
    normed = Net()
    nn.utils.parametrizations.weight_norm(normed.conv)
    check(normed, [])
    shared = Net()
    shared.again = shared.conv
    check(shared, [])
    check(Net(track_running_stats=False), [])
