"""Network in network for 32×32 images, without fully connected layers (Lin et al., 2014).

Three blocks of a k×k convolution (5, 5, 3) and two of 1×1, with a ReLU after each but the last; 3×3
max pooling of stride 2 after the first block, average pooling after the second, global average
pooling after the third. Attention is read at the end of each block, before its pooling: at the
children `block0`, `block1`, `block2`.
"""

from __future__ import annotations

from torch import Tensor, nn

# Channels of each convolution; the last one outputs the classes. `thin` is 0.45 of `wide`.
WIDTHS = {
    "thin": ((86, 72, 43), (86, 86, 86), (86, 86)),
    "wide": ((192, 160, 96), (192, 192, 192), (192, 192)),
}


class NetworkInNetwork(nn.Module):
    """Images (N, 3, H, W) -> logits (N, num_classes).

    `width` is `thin` or `wide`. With `normalised`, batch normalisation follows each convolution, as
    in the paper's Table 1; the networks of its Table 3 have none.
    """

    def __init__(self, width: str, num_classes: int, normalised: bool = True):
        super().__init__()
        first, second, third = WIDTHS[width]
        self.block0 = _block(3, first, 5, normalised)
        self.pool0 = nn.MaxPool2d(3, 2, 1)
        self.block1 = _block(first[-1], second, 5, normalised)
        self.pool1 = nn.AvgPool2d(3, 2, 1)
        self.block2 = _block(second[-1], (*third, num_classes), 3, normalised)
        del self.block2.relu2  # logits may be negative
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool0(self.block0(x))
        x = self.pool1(self.block1(x))
        return self.block2(x).mean((2, 3))


def _block(inputs: int, widths: tuple[int, ...], kernel: int, normalised: bool) -> nn.Sequential:
    block = nn.Sequential()
    for j, outputs in enumerate(widths):
        size = kernel if j == 0 else 1  # the other two are 1×1
        block.add_module(f"conv{j}", nn.Conv2d(inputs, outputs, size, 1, size // 2))
        if normalised:
            block.add_module(f"bn{j}", nn.BatchNorm2d(outputs))
        block.add_module(f"relu{j}", nn.ReLU())
        inputs = outputs
    return block
