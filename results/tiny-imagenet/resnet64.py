"""ResNet-18 and ResNet-34 for 64×64 images: 3×3 stem of stride 2, no pooling, half the channels."""

from timm.models.resnet import BasicBlock, ResNet
from torch import nn


def _resnet(layers, num_classes):
    model = ResNet(BasicBlock, layers, num_classes, channels=(32, 64, 128, 256), stem_width=32)
    model.conv1 = nn.Conv2d(3, 64, 3, 2, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


def resnet18(num_classes):
    return _resnet([2, 2, 2, 2], num_classes)


def resnet34(num_classes):
    return _resnet([3, 4, 6, 3], num_classes)
