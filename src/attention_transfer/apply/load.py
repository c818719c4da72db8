"""Loads networks and images by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.image_folder import EXTENSIONS, find_images
from ..errors import UserError
from ..image_statistics import IMAGENET
from ..models.create import create_model, pretrained_classes, pretrained_images
from ..models.network import Network, fixed_size, load_trained
from ..models.start import LIBRARIES, load_network
from ..models.trained import Preprocess
from ..options import from_mapping
from ..run_folder import RunFolder, is_folder_name
from ..runtime.options import RuntimeOptions
from ..runtime.resolve import resolve_runtime
from .inference import InferenceModel

SMALL_MODELS = ("wrn-", "nin-")  # made for images of 32×32
DEFAULT_SIDE = 224  # of images for networks that do not specify a size


def inference_model(network: Network, device: str, precision: str = "auto") -> InferenceModel:
    """The network on a device; the precision `auto` is that of its run, and fp32 for others.

    Raises:
        UserError: for a device that is not available.
    """
    recorded: dict[str, Any] = {}
    if network.folder is not None:
        recorded = RunFolder(network.folder).environment().get("auto") or {}
    options = from_mapping(RuntimeOptions, {"device": device, "precision": precision})
    # As if a run continued: `auto` then means these values.
    earlier = {"precision": recorded.get("precision", "fp32"), "compile": False}
    runtime = resolve_runtime(options, earlier=earlier)
    model = InferenceModel(network.module, network.preprocess, runtime.precision)
    model.to(runtime.device).eval()
    return model.to(memory_format=torch.channels_last)


def load_by_name(name: str, trust_code: bool = False) -> Network:
    """The network of a run, or a model by name with trained or random weights.

    Args:
        trust_code: allow a run whose network is FILE.py:FACTORY; a `name` of that form is trusted
            in any case.

    Raises:
        UserError: for a folder that is not a finished run, and for an unknown model.
    """
    if is_folder_name(name):
        return load_trained(name, trust_code)
    if name.endswith(":pretrained"):
        count = pretrained_classes(name) or 1000
        return load_network(name, [str(i) for i in range(count)], *IMAGENET, role="network")
    torch.manual_seed(0)  # the same maps each time
    module = create_model(name, 10).eval()
    return Network(module, name, (), Preprocess(*IMAGENET), is_trained=False)


def load_at_own_sizes(names: Sequence[str], trust_code: bool) -> tuple[dict[str, Network], int]:
    """Networks by name, each at its own input size, and the largest side; 224 if none is known.

    Raises:
        UserError: as `load_by_name`.
    """
    networks = {name: load_by_name(name, trust_code) for name in names}
    for name, network in networks.items():
        network.preprocess.size = own_size(name, network)
    sides = [n.preprocess.size[0] for n in networks.values() if n.preprocess.size]
    return networks, max(sides, default=DEFAULT_SIDE)


def own_size(name: str, network: Network) -> tuple[int, int] | None:
    """The input size (H, W) of a network; None if it is not known."""
    size = network.preprocess.size or fixed_size(network.module)
    if size is not None:
        return size
    side = None
    if name.startswith(SMALL_MODELS):
        side = 32
    elif name.startswith(LIBRARIES):
        trained = pretrained_images(f"{name.removesuffix(':pretrained')}:pretrained")
        side = trained.size if trained else DEFAULT_SIDE
    return None if side is None else (side, side)


def image_files(path: Path) -> list[Path]:
    """The file itself, or all image files of a folder (as `folder:` finds them), sorted.

    Raises:
        UserError: if `path` does not exist, or is a folder without images.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: expected an image, or a folder of images")
    if path.is_file():
        return [path]
    files = find_images(path)
    if not files:
        raise UserError(f"no image in {path}: expected {', '.join(sorted(EXTENSIONS))}")
    return files
