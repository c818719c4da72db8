"""The predictions of networks for one image, and their attention maps drawn over it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..apply.inference import InferenceModel, as_input
from ..apply.load import load_at_own_sizes
from ..apply.maps import stage_maps
from ..data.decode import decode_center, open_image
from ..errors import UserError
from ..models.network import Network
from ..models.start import run_once
from ..report.pictures import heat_address, image_address, overlay

# Images larger than any camera's are refused before their pixels are decoded.
MAX_PIXELS = 50_000_000
PICTURE = 224  # side in pixels at which images and maps are shown
CLASSES = 5  # number of predictions to list


@dataclass(frozen=True)
class Viewed:
    """A network with its preprocessing and the layers to show."""

    name: str
    network: Network
    model: InferenceModel
    layers: list[str]


class Viewer:
    """Predictions and attention maps of several networks for an image.

    Raises:
        UserError: if a name is neither a run nor a model, or its network has no feature maps.
    """

    def __init__(self, names: tuple[str, ...], kind: str, p: float, trust_code: bool):
        # As in `maps`, images are decoded at the largest input size of the networks.
        networks, self.size = load_at_own_sizes(names, trust_code)
        self.kind, self.p = kind, p
        self.viewed = [self._ready(name, network) for name, network in networks.items()]

    def _ready(self, name: str, network: Network) -> Viewed:
        run_once(network, torch.zeros(1, 3, self.size, self.size), name)
        model = InferenceModel(network.module, network.preprocess, "fp32").eval()
        layers = [stage.name for stage in model.stages((self.size, self.size))]
        if not layers:
            raise UserError(f"{name} has no feature maps to show")
        return Viewed(name, network, model, layers)

    def describe(self, encoded: bytes) -> dict[str, Any]:
        """The image as a picture, and each network's predictions and pictures of its stages.

        Raises:
            UserError: for bytes that are not an image, and for an image of too many pixels.
        """
        pixels = self._decode(encoded)
        x = as_input(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        picture = _at_picture_size(pixels)
        networks = [self._describe(viewed, x, picture) for viewed in self.viewed]
        return {"image": image_address(picture), "networks": networks}

    def _decode(self, encoded: bytes) -> np.ndarray:
        """The centre of the image (H, W, 3). Nothing is written to disk."""
        from PIL import Image

        pixels = np.zeros((self.size, self.size, 3), np.uint8)
        try:
            with warnings.catch_warnings():
                # Pillow's own limit is larger, and it only warns.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with open_image(encoded) as image:
                    width, height = image.size
            if width * height <= MAX_PIXELS:
                decode_center(pixels, encoded)
        except Exception as error:
            # Pillow raises many kinds of exceptions on damaged input.
            raise UserError("this image cannot be read: expected JPEG, PNG, …") from error
        if width * height > MAX_PIXELS:
            most = MAX_PIXELS // 1_000_000
            raise UserError(
                f"the image has {width}×{height} pixels: expected at most {most} million"
            )
        return pixels

    def _describe(self, viewed: Viewed, x: Tensor, picture: np.ndarray) -> dict[str, Any]:
        logits, maps = stage_maps(viewed.model, viewed.layers, x, self.kind, self.p)
        stages = []
        for layer, attention in zip(viewed.layers, maps, strict=True):
            height, width = attention.shape[1:]
            drawn = heat_address(overlay(picture, attention[0].numpy()))
            stages.append({"layer": layer, "size": f"{height}×{width}", "picture": drawn})
        return {
            "name": viewed.name,
            "note": _note(viewed.network),
            "predictions": _predictions(viewed.network, logits[0]),
            "stages": stages,
        }


def _note(network: Network) -> str:
    if not network.is_trained:
        return "no trained weights: its maps are those of random weights"
    return f"{len(network.classes)} classes"


def _predictions(network: Network, logits: Tensor) -> list[dict[str, Any]]:
    """The most likely classes; empty for a network without trained weights."""
    if not network.is_trained:
        return []
    values, labels = logits.softmax(0).topk(min(CLASSES, len(logits)))
    return [
        {"class": network.classes[label], "probability": round(value, 4)}
        for value, label in zip(values.tolist(), labels.tolist(), strict=True)
    ]


def _at_picture_size(pixels: np.ndarray) -> np.ndarray:
    from PIL import Image

    picture = Image.fromarray(pixels).resize((PICTURE, PICTURE), Image.Resampling.BICUBIC)
    return np.asarray(picture)
