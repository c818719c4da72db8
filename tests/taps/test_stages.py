"""Listing stages."""

from __future__ import annotations

import pytest
import torch
from tapped import HEAD, Small, conv, images, names
from torch import Tensor, nn
from torchvision.models import vgg

import attention_transfer as at


class Nin(nn.Sequential):
    """As Lin et al.: each block ends in its own pooling, the last in the global one or in none."""

    def __init__(self, bn: bool, last: nn.Module | None):
        def block(inputs: int, outputs: int, kernel: int, pool: nn.Module | None) -> nn.Sequential:
            layers: list[nn.Module] = []
            for i, k in ((inputs, kernel), (8, 1), (8, 1)):
                o = outputs if len(layers) >= 4 + 2 * bn else 8
                layers += [
                    nn.Conv2d(i, o, k, padding=k // 2),
                    *([nn.BatchNorm2d(o)] if bn else []),
                    nn.ReLU(True),
                ]
            return nn.Sequential(*layers, *([pool] if pool else []))

        blocks = [
            block(3, 8, 5, nn.MaxPool2d(3, 2, 1)),
            block(8, 8, 5, nn.AvgPool2d(3, 2, 1)),
            block(8, 10, 3, last),
        ]
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


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())

    def forward(self, x):
        return x + self.inner(x)


class ChannelNorm(nn.LayerNorm):
    """As timm's LayerNorm2d."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TestStages:
    @pytest.mark.parametrize("name", ["wrn-10-1", "wrn-10-2", "wrn-16-1"])
    def test_wrn(self, name):
        width = int(name[-1])
        listed = at.stages(at.create_model(name, 10), images(32))
        assert [(s.name, s.shape, s.stride) for s in listed] == [
            ("group0", (2, 16 * width, 32, 32), 1),
            ("group1", (2, 32 * width, 16, 16), 2),
            ("group2", (2, 64 * width, 8, 8), 4),
        ]

    @pytest.mark.parametrize(
        "name", ["torchvision/resnet18", "torchvision/resnet50", "timm/resnet18"]
    )
    def test_resnet(self, name):
        listed = at.stages(at.create_model(name, 10), images(64))
        assert [s.name for s in listed[-4:]] == ["layer1", "layer2", "layer3", "layer4"]
        assert [s.size for s in listed[-4:]] == [(16, 16), (8, 8), (4, 4), (2, 2)]
        # The stem is a stage of its own.
        assert len(listed) == 5 and listed[0].size == (32, 32)

    def test_a_layer_norm_after_the_blocks_is_not_the_end(self):
        class Stage(nn.Module):
            def __init__(self, width):
                super().__init__()
                self.down = nn.Conv2d(width // 2, width, 2, stride=2)
                self.blocks = nn.ModuleList(Block(width) for _ in range(2))
                self.norm = nn.LayerNorm(width)

            def forward(self, x):
                x = self.down(x)
                for block in self.blocks:
                    x = block(x)
                return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Stage(16), Stage(32))
        assert names(model, 32) == ["0", "1.blocks.1", "2.blocks.1"]
        _, features = at.tap(model, ["1", "1.blocks.1"])(torch.rand(2, 3, 32, 32))
        flat, drawn = (at.attention_map(features[layer]) for layer in ("1", "1.blocks.1"))
        assert flat.std(1).max() < 1e-3 * drawn.std(1).min()

    def test_a_batch_norm_after_the_blocks_is_the_end(self):
        blocks = nn.Sequential(Block(3), Block(3), nn.BatchNorm2d(3))
        assert names(nn.Sequential(blocks, nn.Conv2d(3, 8, 2, 2)), 32) == ["0", "1"]

    def test_a_layer_norm_alone_is_not_the_end(self):
        model = nn.Sequential(Block(3), ChannelNorm(3), nn.Conv2d(3, 8, 2, 2), ChannelNorm(8))
        assert names(model, 32) == ["0", "2"]

    def test_small_images_end_early(self):
        # Of 32×32 images, layer4 makes 1×1.
        assert names(at.create_model("torchvision/resnet18", 10), 32)[-1] == "layer3"

    @pytest.mark.parametrize(
        ("bn", "last"), [(False, [1, 4, 9, 14, 19]), (True, [2, 6, 13, 20, 27])]
    )
    def test_vgg(self, bn, last):
        """Without the head, whose 120 million weights would take a second to draw."""
        model = nn.Sequential(vgg.make_layers(vgg.cfgs["A"], bn), nn.AdaptiveAvgPool2d(1))
        listed = names(model, 64)
        assert listed[:5] == [f"0.{i}" for i in last]

    @pytest.mark.parametrize("bn", [False, True])
    def test_nin_with_the_pooling_inside_its_blocks(self, bn):
        end = 8 if bn else 5  # the last ReLU before the pooling
        assert names(Nin(bn, None)) == [f"0.{end}", f"1.{end}", "2"]
        assert names(Nin(bn, nn.AdaptiveAvgPool2d(1))) == [f"0.{end}", f"1.{end}", f"2.{end}"]

    def test_nin_with_the_pooling_between_its_blocks(self):
        model = nn.Sequential(
            conv(3, 8, 5),
            nn.MaxPool2d(3, 2, 1),
            conv(8, 8, 5),
            nn.AvgPool2d(3, 2, 1),
            conv(8, 16),
            *HEAD,
        )
        assert names(model) == ["0", "2", "4"]

    def test_pre_activation_resnet(self):
        def group(i: int, o: int, stride: int) -> nn.Sequential:
            return nn.Sequential(PreActivation(i, o, stride), PreActivation(o, o, 1))

        stem, end = nn.Conv2d(3, 8, 3, 1, 1), (nn.BatchNorm2d(16), nn.ReLU(True), *HEAD)
        assert names(
            nn.Sequential(stem, group(8, 8, 1), group(8, 16, 2), group(16, 16, 2), *end)
        ) == ["1", "2", "3"]
        flat = (
            PreActivation(8, 8, 1),
            PreActivation(8, 16, 2),
            PreActivation(16, 16, 1),
            PreActivation(16, 16, 2),
        )
        assert names(nn.Sequential(stem, *flat, *end)) == ["1", "3", "4"]

    def test_the_relu_after_a_plain_convolution_belongs_to_it(self):
        layers = [
            nn.Conv2d(3, 8, 3, 1, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2, 1),
            nn.ReLU(),
        ]
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

    @pytest.mark.parametrize(
        "model", ["timm/mobilenetv3_small_050", "timm/resnetv2_50", "torchvision/mobilenet_v2"]
    )
    def test_every_stage_can_be_tapped(self, model):
        network = at.create_model(model, 4).eval()
        listed = at.stages(network, images(64))
        with torch.no_grad():
            _, features = at.tap(network, [s.name for s in listed])(images(64))
        assert [tuple(f.shape) for f in features.values()] == [s.shape for s in listed]
        strides = [s.stride for s in listed]
        assert strides == sorted(strides) and len({s.size for s in listed}) == len(listed)
        assert all(s.size != (1, 1) for s in listed)

    def test_images_that_are_not_square(self):
        listed = at.stages(Small(), torch.randn(1, 3, 8, 24))
        assert [(s.size, s.stride) for s in listed] == [((8, 24), 1), ((4, 12), 2)]

    def test_no_stage(self):
        with pytest.raises(
            at.UserError, match=r"no stage in Sequential: .*feature map, \(N, C, H, W\) or tokens"
        ):
            at.stages(nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), images())

    def test_a_pooling_alone_is_no_stage(self):
        pooled = nn.Sequential(conv(3, 8), nn.MaxPool2d(2), conv(8, 16), nn.MaxPool2d(2), *HEAD)
        assert names(pooled) == ["0", "2"]
        # Nor is the pooling before a residual stage: its first layer still works above.
        reduced = nn.Sequential(conv(3, 8), nn.MaxPool2d(2), PreActivation(8, 16, 2), *HEAD)
        assert names(reduced) == ["0", "2"]

    def test_a_block_that_lowers_the_resolution_with_its_last_layer(self):
        """The last feature map before the drop is inside it."""
        block = nn.Sequential(conv(8, 8), conv(8, 8), nn.Conv2d(8, 16, 3, 2, 1))
        assert names(nn.Sequential(conv(3, 8), block, conv(16, 16), *HEAD)) == ["1.1", "2"]

    def test_a_block_that_restores_its_resolution(self):
        class Hourglass(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.down, self.work, self.up = (
                    nn.AvgPool2d(4),
                    nn.Conv2d(8, 8, 1),
                    nn.Upsample(scale_factor=4),
                )

            def forward(self, x: Tensor) -> Tensor:
                return x + self.up(self.work(self.down(x)))

        model = nn.Sequential(conv(3, 8), Hourglass(), conv(8, 16, stride=2), *HEAD)
        assert names(model) == ["1", "2"]

    def test_the_norm_after_a_convolution_of_its_own_belongs_to_it(self):
        """A stem of several convolutions, then BN-ReLU: no pre-activation."""
        stem = nn.Sequential(conv(3, 8), nn.Conv2d(8, 16, 3, 1, 1))
        assert names(nn.Sequential(stem, nn.BatchNorm2d(16), nn.ReLU(), *HEAD)) == ["2"]

    def test_convolutions_without_padding_are_no_drop(self):
        """30 and 28 are one resolution, 14 another."""
        layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 16, 1)]
        assert names(nn.Sequential(*layers, *HEAD)) == ["1", "3"]

    def test_depth(self):
        listed = at.stages(
            nn.Sequential(conv(3, 8), nn.Sequential(conv(8, 8), conv(8, 16, stride=2)), *HEAD),
            images(),
        )
        assert [(s.name, s.depth) for s in listed] == [("1.0", 2), ("1.1", 3)]

    @pytest.mark.parametrize("size", [(32, 32), (16, 32)])
    def test_a_transformer_has_one_stage_its_last_block(self, size):
        class Encoder(nn.Module):
            """Says nothing of its class token or its patches."""

            def __init__(self) -> None:
                super().__init__()
                self.patches, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.zeros(1, 1, 8))
                blocks = (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))
                self.blocks = nn.Sequential(*blocks)
                self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 5)

            def forward(self, x: Tensor) -> Tensor:
                tokens = torch.cat(
                    [self.token.expand(len(x), -1, -1), self.patches(x).flatten(2).mT], 1
                )
                return self.fc(self.norm(self.blocks(tokens))[:, 0])

        (stage,) = at.stages(Encoder(), torch.randn(2, 3, *size))
        assert (stage.name, stage.stride, stage.channels, stage.size) == (
            "blocks",
            4,
            8,
            (size[0] // 4, size[1] // 4),
        )
        assert stage.shape == ((2, 64, 8) if size == (32, 32) else (2, 8, 4, 8))

    def test_a_network_for_another_image_size(self):
        class Fixed(Small):
            def forward(self, x: Tensor) -> Tensor:
                assert x.shape[-1] == 32, "Input height (16) doesn't match model (32)."
                return super().forward(x)

        with pytest.raises(
            at.UserError, match=r"Fixed does not take images \(2, 3, 16, 16\): Input height"
        ):
            at.stages(Fixed(), images(16))
