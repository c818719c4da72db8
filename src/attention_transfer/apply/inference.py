"""What a finished run says about its network: accuracy, cost, speed, attention maps, attention on the object."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Images, balanced_subset
from ..maps import as_grid, attention_map
from ..run_folder import replacing
from ..runtime.resolve import count_flops
from ..taps import Stage, evaluating, tap, try_stages
from .evaluate import as_input

SHOWN_IMAGES = 32
BOXED_IMAGES = 500


class InferenceModel(nn.Module):
    """A network with its preprocessing, in eval mode under the run's precision: images in [0, 1] -> logits (N, K)."""

    def __init__(self, module: nn.Module, preprocess: nn.Module, precision: str):
        super().__init__()
        self.module, self.preprocess, self.bf16 = module, preprocess, precision == "bf16"

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self.module(self.preprocess(x)).float()

    def stages(self, image_size: tuple[int, int]) -> list[Stage]:
        """The network's stages for images of this size; none where it has no feature maps."""
        device = next(self.parameters()).device
        return try_stages(
            self.module, self.preprocess(torch.zeros(1, 3, *image_size, device=device))
        )


def cost(
    network: InferenceModel, image_size: tuple[int, int], batch_size: int = 128
) -> dict[str, Any]:
    """Parameters, FLOPs of one image (2 a multiply-add), inference images/s and latency in ms (one image)."""
    from torch.utils.benchmark import Timer

    device = next(network.parameters()).device
    one = torch.rand(1, 3, *image_size, device=device).to(memory_format=torch.channels_last)
    many = one.repeat(batch_size, 1, 1, 1).to(memory_format=torch.channels_last)
    with evaluating(network):
        flops = count_flops(network, one)

        def seconds(x: Tensor) -> float:
            timer = Timer(
                "network(x)",
                globals={"network": network, "x": x},
                num_threads=torch.get_num_threads(),
            )
            return timer.blocked_autorange(min_run_time=0.2).median

        rate, latency = batch_size / seconds(many), seconds(one)
    return {
        "parameters": sum(p.numel() for p in network.module.parameters()),
        "flops": flops,
        "inference": {
            "images_per_second": rate,
            "batch_size": batch_size,
            "latency_ms": latency * 1e3,
        },
    }


def stage_maps(
    network: InferenceModel, layers: list[str], x: Tensor, kind: str = "sum", p: float = 2.0
) -> tuple[Tensor, list[Tensor]]:
    """Logits (N, K) and the normalised map of each layer as (N, h, w)."""
    with evaluating(network), tap(network.module, layers) as tapped:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=network.bf16):
            logits, features = tapped(network.preprocess(x))
        return logits.float(), [
            attention_map(f, kind, p).unflatten(1, tuple(as_grid(f).shape[2:]))
            for f in features.values()
        ]


def save_maps(
    file: Any, network: InferenceModel, layers: list[str], images: Images, device: torch.device
) -> None:
    """The maps of a few images, balanced over the classes and the same for every run on a data set, as npz."""
    chosen = images.subset(balanced_subset(images.labels, SHOWN_IMAGES, seed=0))
    logits, maps = stage_maps(network, layers, as_input(chosen.batch(slice(None)).to(device)))
    arrays: dict[str, Any] = {f"map.{j}": m.float().cpu().numpy() for j, m in enumerate(maps)}
    if chosen.boxes is not None:
        arrays["boxes"] = chosen.boxes.cpu().numpy()
    with replacing(file) as partial, open(partial, "wb") as stream:
        np.savez_compressed(
            stream,
            images=chosen.images.cpu().numpy(),
            labels=chosen.labels.cpu().numpy(),
            predictions=logits.argmax(1).cpu().numpy(),
            stages=np.array(layers),
            classes=np.array(images.classes),
            **arrays,
        )


def attention_in_box(
    network: InferenceModel, layers: list[str], images: Images, device: torch.device
) -> dict[str, Any] | None:
    """The mean share of each stage's attention that falls inside the object's box; None where no box is known.

    Q (not Y) as a distribution: bilinearly brought to the image's size, divided by its sum. `box_area` is what a
    uniform map would score.
    """
    if images.boxes is None or not layers:
        return None
    known = (images.boxes[:, 2] > images.boxes[:, 0]).nonzero().flatten().cpu()
    if not len(known):
        return None
    known = known[balanced_subset(images.labels.cpu()[known], BOXED_IMAGES, seed=0)]
    chosen = images.subset(known)
    assert chosen.boxes is not None
    inside = box_masks(chosen.boxes, chosen.image_size).to(device)
    shares = []
    for start in range(0, len(chosen), 128):
        part = slice(start, start + 128)
        _, maps = stage_maps(network, layers, as_input(chosen.batch(part).to(device)))
        shares.append(torch.stack([share_inside(m, inside[part]) for m in maps]))
    return {
        "stages": layers,
        "in_box": torch.cat(shares, 1).mean(1).tolist(),
        "box_area": inside.float().mean().item(),
        "images": len(chosen),
    }


def box_masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (N, 4) as x0, y0, x1, y1, half-open -> masks (N, H, W)."""
    y, x = torch.arange(size[0])[None, :, None], torch.arange(size[1])[None, None, :]
    x0, y0, x1, y1 = (boxes.cpu()[:, j, None, None] for j in range(4))
    return (x >= x0) & (x < x1) & (y >= y0) & (y < y1)


def share_inside(maps: Tensor, inside: Tensor) -> Tensor:
    """The share of maps (N, h, w) inside masks (N, H, W): (N,)."""
    size = (inside.shape[1], inside.shape[2])
    full = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    return (full * inside).sum((1, 2)) / full.sum((1, 2)).clamp_min(1e-12)
