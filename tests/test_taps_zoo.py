"""Stages of timm's and torchvision's networks; features against `forward_intermediates`."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import attention_transfer as at

LAYERS = ["layer1", "layer2", "layer3", "layer4"]
FOUR = ["stages.0", "stages.1", "stages.2", "stages.3"]
# What must be listed on 64×64 images, at strides 2, 4, 8, 16 and 32 unless said.
CONVOLUTIONAL = {
    "timm/resnet18": ["act1", *LAYERS],
    "timm/resnet26d": ["act1", *LAYERS],  # a stem of three convolutions
    "torchvision/resnet18": ["relu", *LAYERS],
    "timm/resnext50_32x4d": ["act1", *LAYERS],
    "torchvision/resnext50_32x4d": ["relu", *LAYERS],
    # The last norm belongs to no block; in timm's list it is the last entry.
    "timm/densenet121": ["features.norm0", *(f"features.denseblock{k}" for k in (1, 2, 3, 4))],
    # The convolution of a transition is what comes last before its pooling.
    "torchvision/densenet121": [
        "features.relu0",
        *(f"features.transition{k}.conv" for k in (1, 2, 3)),
        "features.denseblock4",
    ],
    "timm/mobilenetv2_050": [f"blocks.{k}" for k in (0, 1, 2, 4, 6)],
    "torchvision/mobilenet_v2": [f"features.{k}" for k in (1, 3, 6, 13, 18)],
    "timm/mobilenetv3_small_050": ["bn1", *(f"blocks.{k}" for k in (0, 1, 3, 5))],
    "torchvision/mobilenet_v3_small": [f"features.{k}" for k in (0, 1, 3, 8, 12)],
    "timm/efficientnet_b0": [f"blocks.{k}" for k in (0, 1, 2, 4, 6)],
    "torchvision/efficientnet_b0": [f"features.{k}" for k in (1, 2, 3, 5, 8)],
    "timm/regnetx_002": ["stem", "s1", "s2", "s3", "s4"],
    "torchvision/regnet_y_400mf": ["stem", *(f"trunk_output.block{k}" for k in (1, 2, 3, 4))],
    "timm/repvgg_a0": ["stem", *FOUR],
    "timm/ghostnet_050": ["conv_stem", *(f"blocks.{k}" for k in (1, 3, 5, 7))],
    "timm/resnetv2_50": ["stem.conv", *FOUR],
}
# {network: (image size, [(layer, stride)])}
OTHERS = {
    # Stride 4 is the stem's max-pooling alone, at which no layer works.
    "torchvision/shufflenet_v2_x0_5": (
        64,
        [("conv1", 2), ("stage2", 8), ("stage3", 16), ("conv5", 32)],
    ),
    # Stride 32 is the last max-pooling alone.
    "timm/vgg11": (64, [(f"features.{k}", 2**j) for j, k in enumerate((1, 4, 9, 14, 19))]),
    "torchvision/vgg11": (64, [(f"features.{k}", 2**j) for j, k in enumerate((1, 4, 9, 14, 19))]),
    "torchvision/vgg11_bn": (
        64,
        [(f"features.{k}", 2**j) for j, k in enumerate((2, 6, 13, 20, 27))],
    ),
    # Their stages end in a LayerNorm, whose map is flat: the last block before it counts.
    "timm/pvt_v2_b0": (64, [(f"{name}.blocks.1", 4 * 2**j) for j, name in enumerate(FOUR)]),
    "timm/gcvit_xxtiny": (
        224,
        [*((name, 4 * 2**j) for j, name in enumerate(FOUR[:3])), ("stages.3.blocks.1", 32)],
    ),
    "timm/convnext_atto": (64, [(name, 4 * 2**j) for j, name in enumerate(FOUR)]),
    "torchvision/convnext_tiny": (
        64,
        [(f"features.{k}", 2 ** (j + 2)) for j, k in enumerate((1, 3, 5, 7))],
    ),
    "torchvision/swin_t": (
        64,
        [(f"features.{k}", 2 ** (j + 2)) for j, k in enumerate((1, 3, 5, 7))],
    ),
    "torchvision/maxvit_t": (224, [("stem", 2), *((f"blocks.{k}", 4 * 2**k) for k in range(4))]),
    "torchvision/vit_b_16": (224, [("encoder.layers", 16)]),
    "timm/vit_tiny_patch16_224": (224, [("blocks.11", 16)]),
    "timm/deit_tiny_distilled_patch16_224": (224, [("blocks.11", 16)]),
    "timm/swin_tiny_patch4_window7_224": (224, [(f"layers.{k}", 4 * 2**k) for k in range(4)]),
    "timm/levit_128s": (224, [("stages.0", 16), ("stages.1", 32), ("stages.2", 56)]),
    # Works on windows only, each a sample of its own.
    "timm/nest_tiny_jx": (224, [(f"levels.{k}", 4 * 2**k) for k in range(3)]),
    "timm/pit_ti_224": (
        224,
        [("transformers.0", 224 / 27), ("transformers.1", 16), ("transformers.2", 32)],
    ),
    "timm/mvitv2_tiny": (224, [(name, 4 * 2**j) for j, name in enumerate(FOUR)]),
}
# Convolutions without padding: 299, 149, 147, 147, 73, 71, 35, 17, 8.
INCEPTION = ["Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"]


def empty(name: str) -> nn.Module:
    """A network without weights, since stages take only shapes."""
    # torchvision's RegNet computes its widths from tensors, so that it cannot be made on meta.
    with torch.device("cpu" if "regnet_y" in name else "meta"):
        source, _, rest = name.partition("/")
        extra: dict[str, Any] = (
            {"aux_logits": False, "init_weights": False} if rest == "inception_v3" else {}
        )
        if source == "timm":
            return timm.create_model(rest, num_classes=5)
        return torchvision.models.get_model(rest, num_classes=5, **extra)


def list_stages(name: str, size: int) -> list[at.Stage]:
    model = empty(name)
    return at.stages(model, torch.zeros(2, 3, size, size, device=next(model.parameters()).device))


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutional(name):
    listed = list_stages(name, 64)
    assert [s.name for s in listed] == CONVOLUTIONAL[name]
    assert [s.stride for s in listed] == [2, 4, 8, 16, 32]
    assert [len(s.shape) for s in listed] == [4] * 5 and [s.shape[2:] for s in listed] == [
        s.size for s in listed
    ]
    depths = [s.depth for s in listed]
    assert depths == sorted(set(depths))


@pytest.mark.parametrize("name", OTHERS)
def test_others(name):
    size, expected = OTHERS[name]
    listed = list_stages(name, size)
    assert [(s.name, pytest.approx(s.stride)) for s in listed] == expected


@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_inception(source):
    listed = list_stages(f"{source}/inception_v3", 299)
    assert [s.name for s in listed] == INCEPTION
    assert [s.size for s in listed] == [(n, n) for n in (147, 71, 35, 17, 8)]
    assert [s.channels for s in listed] == [64, 192, 288, 768, 2048]


def test_depth_counts_the_layers_with_weights():
    """ResNet-18: the stem, four a stage, and one in each shortcut from the second stage on."""
    assert [s.depth for s in list_stages("torchvision/resnet18", 64)] == [1, 5, 10, 15, 20]
    # Patches, then qkv, projection and two of the MLP a block.
    assert [s.depth for s in list_stages("timm/vit_tiny_patch16_224", 224)] == [1 + 12 * 4]


@pytest.mark.parametrize(
    "name", ["resnet18", "convnext_atto", "mobilenetv3_small_050", "swin_tiny_patch4_window7_224"]
)
def test_channels_and_strides_are_those_timm_says(name):
    model = empty(f"timm/{name}")
    listed = at.stages(model, torch.zeros(2, 3, 224, 224, device="meta"))
    stated = [(e["num_chs"], e["reduction"]) for e in model.feature_info]
    assert [(s.channels, s.stride) for s in listed] == stated


def intermediate(model: nn.Module, x: Tensor, block: int) -> Tensor:
    """timm's own (N, C, h, w) of one block."""
    (output,) = model.forward_intermediates(
        x, indices=[block], intermediates_only=True, output_fmt="NCHW"
    )
    return output


SMALL = {"embed_dim": 12, "num_heads": 2, "num_classes": 3}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "class token": ("vit_tiny_patch16_224", {**SMALL, "img_size": 64, "depth": 2}, (64, 64)),
    "not square": ("vit_tiny_patch16_224", {**SMALL, "img_size": (64, 96), "depth": 2}, (64, 96)),
    "any size": ("vit_tiny_patch16_224", {**SMALL, "depth": 2, "dynamic_img_size": True}, (96, 48)),
    "registers": ("vit_small_patch14_reg4_dinov2", {**SMALL, "img_size": 56, "depth": 2}, (56, 56)),
    "no prefix": (
        "vit_base_patch16_siglip_gap_224",
        {**SMALL, "img_size": 64, "depth": 2},
        (64, 64),
    ),
    "distilled": (
        "deit_tiny_distilled_patch16_224",
        {**SMALL, "img_size": 64, "depth": 2},
        (64, 64),
    ),
    "relative positions": (
        "eva02_tiny_patch14_224",
        {**SMALL, "embed_dim": 16, "img_size": 56, "depth": 2},
        (56, 56),
    ),
    "any proportions": ("naflexvit_base_patch16_gap", {**SMALL, "depth": 2}, (48, 80)),
    "NHWC": (
        "samvit_base_patch16",
        {**SMALL, "img_size": 64, "depth": 2, "global_attn_indexes": ()},
        (64, 64),
    ),
    "shuffled tokens": (
        "hiera_tiny_224",
        {"embed_dim": 12, "num_heads": 1, "stages": (1, 1, 1, 1), "num_classes": 3},
        (224, 224),
    ),
}


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_features_are_those_timm_gives(case):
    name, options, size = TRANSFORMERS[case]
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    x = torch.randn(2, 3, *size)
    stage = at.stages(model, x)[-1]
    block = int(stage.name.removeprefix("blocks."))
    with torch.no_grad():
        expected = intermediate(model, x, block)
        for example in (x, None):
            features = at.tap(model, [stage.name], example)(x)[1][stage.name]
            assert features.shape == stage.shape
            if features.ndim == 3:
                features = features.transpose(1, 2).unflatten(2, stage.size)
            torch.testing.assert_close(features, expected)
    assert stage.channels == expected.shape[1] and stage.size == tuple(expected.shape[2:])
    assert (len(stage.shape) == 4) == (
        stage.size[0] != stage.size[1] or case in ("NHWC", "shuffled tokens")
    )


@pytest.mark.parametrize("size", [64, 96])
def test_swin_as_timm_gives_it(size):
    """At 96 the first stage is a cube, 24×24×24, whose shape does not tell the channels."""
    options = {
        "embed_dim": 24,
        "depths": (1, 1),
        "num_heads": (1, 2),
        "window_size": 4,
        "num_classes": 3,
    }
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=size, **options).eval()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features = at.tap(model, ["layers.0", "layers.1"])(x)[1]
        for k, output in enumerate(features.values()):
            torch.testing.assert_close(output, intermediate(model, x, k))


@pytest.mark.parametrize(
    ("name", "size"), [("test_convnext", 96), ("pvt_v2_b0", 128), ("edgenext_xx_small", 96)]
)
def test_a_cube_of_timms_that_is_channels_first_outside(name, size):
    """Convolutions, and linear layers over channels that are last for them only."""
    model = timm.create_model(name, num_classes=3).eval()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features = at.tap(model, ["stages.0"])(x)[1]["stages.0"]
        assert features.shape[1] == features.shape[2] == features.shape[3]
        torch.testing.assert_close(features, intermediate(model, x, 0))


def test_torchvisions_swin():
    """Its stages put out (N, h, w, C); at 96 pixels the first is a cube."""
    options = {
        "patch_size": [4, 4],
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": [4, 4],
        "num_classes": 3,
    }
    model = torchvision.models.SwinTransformer(embed_dim=24, **options).eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        features = at.tap(model, ["features.1", "features.3"])(x)[1]
        first = model.features[:2](x)
        torch.testing.assert_close(features["features.1"], first.permute(0, 3, 1, 2))
        torch.testing.assert_close(
            features["features.3"], model.features[2:](first).permute(0, 3, 1, 2)
        )


def test_torchvisions_convnext_is_channels_first_outside():
    """Permuted to channels last and back inside each block; at 96 pixels, width 24, a cube."""
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    model = ConvNeXt([CNBlockConfig(24, 48, 1), CNBlockConfig(48, None, 1)], num_classes=3).eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(
            at.tap(model, ["features.1"])(x)[1]["features.1"], model.features[:2](x)
        )


def test_torchvisions_vit():
    model = torchvision.models.VisionTransformer(64, 16, 2, 2, 12, 24, num_classes=3).eval()
    x = torch.randn(2, 3, 64, 64)
    (stage,) = at.stages(model, x)
    assert (stage.name, stage.shape, stage.stride, stage.size) == (
        "encoder.layers",
        (2, 16, 12),
        16,
        (4, 4),
    )
    with torch.no_grad():
        tokens = torch.cat([model.class_token.expand(2, -1, -1), model._process_input(x)], 1)
        expected = model.encoder.layers(tokens + model.encoder.pos_embedding)
        torch.testing.assert_close(at.tap(model, [stage.name])(x)[1][stage.name], expected[:, 1:])


class TestTransfer:
    """Between kinds of networks."""

    def vit(self, size: Any = 64) -> nn.Module:
        return timm.create_model("vit_tiny_patch16_224", img_size=size, depth=2, **SMALL)

    @pytest.mark.parametrize("size", [(64, 64), (64, 96)])
    def test_a_vit_teaches_a_cnn(self, size):
        student, x = timm.create_model("resnet10t", num_classes=3), torch.randn(2, 3, *size)
        transfer = at.Transfer(student, self.vit(size), [at.ActivationTransfer(1e3)], example=x)
        assert transfer.pairs == [("layer3", "blocks.1")]  # both of stride 16
        transfer(x, torch.tensor([0, 1])).parts["at"].backward()
        (s,), (t,) = transfer.features(x)
        q = t.square().sum(2 if t.ndim == 3 else 1).flatten(1)
        a = s.square().sum(1).flatten(1)
        transfer.student.eval()
        difference = a / a.norm(dim=1, keepdim=True) - q / q.norm(dim=1, keepdim=True)
        expected = 1e3 * difference.square().mean()
        torch.testing.assert_close(transfer(x, torch.tensor([0, 1])).parts["at"], expected)
        assert student.conv1[0].weight.grad.abs().sum() > 0

    def test_a_cnn_teaches_a_vit_and_a_swin(self):
        x, y = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
        swin = timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=64,
            depths=(1, 1),
            num_heads=(1, 2),
            embed_dim=12,
            window_size=4,
        )
        teacher = timm.create_model("resnet10t", num_classes=3)
        for student, pairs in (
            (self.vit(), [("blocks.1", "layer3")]),
            (swin, [("layers.0", "layer1"), ("layers.1", "layer2")]),
        ):
            transfer = at.Transfer(student, teacher, [at.ActivationTransfer()], example=x)
            assert transfer.pairs == pairs
            transfer(x, y).parts["at"].backward()
            assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())

    def test_inputs_of_different_size(self):
        """Each stride is that from the network's own input: 32×32 and 64×64 here."""
        student, teacher = (
            at.create_model("wrn-10-1", 3),
            timm.create_model("resnet10t", num_classes=3),
        )
        xs, xt = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 64, 64)
        assert at.pair_stages(student, teacher, (xs, xt)) == [
            ("group1", "act1"),
            ("group2", "layer1"),
        ]
        assert [s.size for s in at.stages(teacher, xt)][:2] == [(32, 32), (16, 16)]
        transfer = at.Transfer(
            student,
            teacher,
            [at.ActivationTransfer()],
            example=xs,
            teacher_transform=lambda x: nn.functional.interpolate(x, (64, 64)),
        )
        assert transfer.pairs == [("group1", "act1"), ("group2", "layer1")]
        assert transfer(xs, torch.tensor([0, 1])).parts["at"].isfinite()
