"""Code for a model card that loads a student from the Hugging Face hub without this package."""

from __future__ import annotations

from typing import Any

from ..models.create import AUXILIARY_HEADS
from ..models.network import Network

WEIGHTS = "model.safetensors"
GRAPH = "model.pt2"

TIMM = """\
import timm

model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image).unsqueeze(0))  # image: a PIL image, RGB
"""
TORCHVISION = """\
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import nn
from torchvision.models import get_model
from torchvision.transforms import Normalize

network = get_model("{name}", {arguments})
network.load_state_dict(load_file(hf_hub_download("{repo}", "model.safetensors")))
model = nn.Sequential(Normalize({mean}, {std}), network).eval()
logits = model(images)  # images: float (N, 3, {height}, {width}), RGB, in [0, 1]
"""
PT2 = """\
import torch
from huggingface_hub import hf_hub_download

model = torch.export.load(hf_hub_download("{repo}", "model.pt2")).module()
logits = model(images)  # images: float (N, 3, {height}, {width}), RGB, in [0, 1]
"""


def library(network: Network) -> str | None:
    """The library that makes this network from its name: timm or torchvision; None for others."""
    name = network.name.partition("/")[0]
    return name if name in ("timm", "torchvision") else None


def library_name(network: Network) -> str:
    """The network's name in its library."""
    return network.name.partition("/")[2].removesuffix(":pretrained")


def loading_code(network: Network, repo: str) -> str:
    """Python that loads a network from the hub and classifies images; it needs no package of ours.

    A network of timm or torchvision is made by its library, any other is a graph of
    `torch.export`.
    """
    height, width = network.image_size
    values: dict[str, Any] = {"repo": repo, "height": height, "width": width}
    match library(network):
        case "timm":
            return TIMM.format(**values)
        case "torchvision":
            name = library_name(network)
            arguments = f"num_classes={len(network.classes)}"
            if name in AUXILIARY_HEADS:
                arguments += ", aux_logits=False, init_weights=False"
            mean, std = mean_and_std(network)
            return TORCHVISION.format(name=name, arguments=arguments, mean=mean, std=std, **values)
    return PT2.format(**values)


def mean_and_std(network: Network) -> tuple[list[float], list[float]]:
    """The normalisation as numbers that a person can read; float32 holds no more digits."""
    mean, std = (
        [float(f"{value:.7g}") for value in values] for values in network.preprocess.statistics
    )
    return mean, std
