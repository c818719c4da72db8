"""`InferenceModel`: a trained network with its preprocessing; and its size and speed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.resolve import count_flops
from ..taps import Stage, evaluating, try_stages


class InferenceModel(nn.Module):
    """A network with its preprocessing, in a precision: fp32, or bf16 by autocast.

    Images (N, 3, H, W) in [0, 1] -> float32 logits (N, K).
    """

    def __init__(self, module: nn.Module, preprocess: nn.Module, precision: str):
        super().__init__()
        self.module, self.preprocess = module, preprocess
        self.precision, self.bf16 = precision, precision == "bf16"

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self.module(self.preprocess(x)).float()

    def stages(self, image_size: tuple[int, int]) -> list[Stage]:
        """The network's stages for images of this size; empty if it has no feature maps."""
        example = torch.zeros(1, 3, *image_size, device=self.device)
        return try_stages(self.module, self.preprocess(example))


def as_input(x: Tensor) -> Tensor:
    """uint8 images -> float32 in [0, 1], in the same memory format."""
    return x.float() / 255


def profile(
    network: InferenceModel, image_size: tuple[int, int], batch_size: int = 128
) -> dict[str, Any]:
    """Parameters, FLOPs of one image (2 per multiply-add) and speed.

    `inference` has images per second at `batch_size`, and the latency of one image in ms.
    """
    image = torch.rand(1, 3, *image_size, device=network.device)
    image = image.to(memory_format=torch.channels_last)
    batch = image.repeat(batch_size, 1, 1, 1).to(memory_format=torch.channels_last)
    with evaluating(network):
        flops = count_flops(network, image)
        batch_seconds = median_seconds(network, batch)
        image_seconds = median_seconds(network, image)
    return {
        "parameters": sum(p.numel() for p in network.module.parameters()),
        "flops": flops,
        "inference": {
            "images_per_second": batch_size / batch_seconds,
            "batch_size": batch_size,
            "latency_ms": image_seconds * 1e3,
        },
    }


def median_seconds(network: nn.Module, x: Tensor, min_run_time: float = 0.2) -> float:
    """Seconds of `network(x)`, measured for `min_run_time` seconds or more."""
    from torch.utils.benchmark import Timer

    names = {"network": network, "x": x}
    # Timer's own default is one thread.
    timer = Timer("network(x)", globals=names, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_run_time).median
