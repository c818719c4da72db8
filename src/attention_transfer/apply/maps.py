"""Attention maps of images: for the report, for the figure of `maps`, and their share in boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.dataset import Images
from ..data.decode import decode_into
from ..data.images import ImageSet, balanced_subset
from ..data.open import open_data
from ..errors import UserError, about
from ..maps import as_grid, attention_map
from ..models.network import Network
from ..models.start import run_once
from ..run_folder import RunFolder, replacing
from ..second_order import input_gradient
from ..taps import evaluating, tap
from .inference import InferenceModel, as_input
from .load import image_files, load_at_own_sizes

BOXED_IMAGES = 500
BATCH = 128

# (title, predicted classes or None, {stage: maps (K, h, w)}), the arguments of report.MapColumn
NetworkMaps = tuple[str, list[str] | None, dict[str, np.ndarray]]


def stage_maps(
    network: InferenceModel, layers: list[str], x: Tensor, kind: str = "sum", p: float = 2.0
) -> tuple[Tensor, list[Tensor]]:
    """Logits (N, K) of images x, and the normalised attention map (N, h, w) of each layer.

    Raises:
        UserError: for features that are too large; the message names the layer.
    """
    attention = kind == "attention"
    with evaluating(network), tap(network.module, layers, attention=attention) as tapped:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=network.bf16):
            logits, features = tapped(network.preprocess(x))
        maps = []
        for layer, f in features.items():
            with about(layer):
                maps.append(map_on_grid(f, kind, p))
        return logits.float(), maps


def map_on_grid(features: Tensor, kind: str = "sum", p: float = 2.0) -> Tensor:
    """The normalised attention map (N, h, w) of features (N, C, h, w), or of tokens (N, L, D)."""
    height, width = as_grid(features).shape[2:]
    return attention_map(features, kind, p).unflatten(1, (height, width))


def save_maps(
    file: Path,
    network: InferenceModel,
    layers: list[str],
    images: Images,
    shown: Tensor,
    teacher: InferenceModel | None = None,
    kinds: tuple[str, str] = ("sum", "sum"),
) -> None:
    """Writes the maps of the images at `shown` as npz, for the report.

    The teacher's maps of the same images have names that start with `teacher.`. `kinds` are the
    kinds of map of network and teacher; `attention` applies to stages that have attention.
    """
    chosen = images.subset(shown)
    x = as_input(chosen.batch(slice(None)).to(network.device))
    arrays = _map_arrays(network, layers, x, "", kinds[0])
    if teacher is not None and (teacher_layers := layer_names(teacher, images)):
        arrays |= _map_arrays(teacher, teacher_layers, x, "teacher.", kinds[1])
    if chosen.boxes is not None:
        arrays["boxes"] = chosen.boxes.cpu().numpy()
    with replacing(file) as partial, open(partial, "wb") as stream:
        np.savez_compressed(
            stream,
            images=chosen.images.cpu().numpy(),
            labels=chosen.labels.cpu().numpy(),
            classes=np.array(images.classes),
            **arrays,
        )


def _map_arrays(
    network: InferenceModel, layers: list[str], x: Tensor, prefix: str, kind: str
) -> dict[str, Any]:
    """The maps, stages and predictions of one network, by their names in the file."""
    if kind == "attention":
        layers, kind = _attention_or_sum(network, layers, x)
    logits, maps = stage_maps(network, layers, x, kind)
    arrays = {f"map.{j}": m.float().cpu().numpy() for j, m in enumerate(maps)}
    arrays |= {"stages": np.array(layers), "predictions": logits.argmax(1).cpu().numpy()}
    return {f"{prefix}{name}": array for name, array in arrays.items()}


def layer_names(network: InferenceModel, images: Images) -> list[str]:
    """The stages of a network for these images; empty if it has no feature maps."""
    return [stage.name for stage in network.stages(images.image_size)]


def attention_in_box(
    network: InferenceModel, layers: list[str], images: Images
) -> dict[str, Any] | None:
    """How well each stage's attention agrees with the object's box; None if no box is known.

    `in_box` is the mean share of the map's sum inside the box, after the map was resized bilinearly
    to the image; `box_area`, the share of a uniform map, is chance. `pointing` is the share of
    images in which the centre of the map's largest cell is inside the box (the pointing game, Zhang
    et al. 2016); `random_pointing` is that of a random cell.
    """
    if images.boxes is None or not layers:
        return None
    has_box = images.boxes[:, 2] > images.boxes[:, 0]  # an unknown box is 0, 0, 0, 0
    boxed = has_box.nonzero().flatten().cpu()
    if not len(boxed):
        return None
    boxed = boxed[balanced_subset(images.labels.cpu()[boxed], BOXED_IMAGES, seed=0)]
    chosen = images.subset(boxed)
    assert chosen.boxes is not None
    masks = box_masks(chosen.boxes, chosen.image_size).to(network.device)
    shares, hits, random_hits = [], [], []
    for start in range(0, len(chosen), BATCH):
        part = slice(start, start + BATCH)
        x = as_input(chosen.batch(part).to(network.device))
        _, maps = stage_maps(network, layers, x)
        shares.append(torch.stack([share_inside(m, masks[part]) for m in maps]))
        at_cells = [at_centres(masks[part], (m.shape[1], m.shape[2])) for m in maps]
        hits.append(torch.stack([peak_inside(m, c) for m, c in zip(maps, at_cells, strict=True)]))
        random_hits.append(torch.stack([c.float().mean((1, 2)) for c in at_cells]))
    return {
        "stages": layers,
        "in_box": torch.cat(shares, 1).mean(1).tolist(),
        "pointing": torch.cat(hits, 1).float().mean(1).tolist(),
        "random_pointing": torch.cat(random_hits, 1).mean(1).tolist(),
        "box_area": masks.float().mean().item(),
        "images": len(chosen),
    }


def box_masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (N, 4) as x0, y0, x1, y1, half-open, in pixels -> masks (N, H, W)."""
    y, x = torch.arange(size[0])[None, :, None], torch.arange(size[1])[None, None, :]
    x0, y0, x1, y1 = boxes.cpu()[:, :, None, None].unbind(1)
    return (x >= x0) & (x < x1) & (y >= y0) & (y < y1)


def share_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """The share of each map (N, h, w) inside its mask (N, H, W): (N,)."""
    size = masks.shape[1:]
    full = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    # A map of zeros has no attention inside: 0, not 0/0.
    return (full * masks).sum((1, 2)) / full.sum((1, 2)).clamp_min(1e-12)


def peak_inside(maps: Tensor, cells: Tensor) -> Tensor:
    """Whether the largest value of each map (N, h, w) is in a marked cell (N, h, w): (N,) bool."""
    peaks = maps.flatten(1).argmax(1, keepdim=True)
    # A flat map has no largest value.
    is_flat = maps.amax((1, 2)) == maps.amin((1, 2))
    return cells.flatten(1).gather(1, peaks)[:, 0] & ~is_flat


def at_centres(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """The values of masks (N, H, W) at the centres of a grid's cells: (N, h, w)."""
    rows, columns = (
        ((torch.arange(cells, device=masks.device) + 0.5) * pixels / cells).long()
        for cells, pixels in zip(size, masks.shape[1:], strict=True)
    )
    return masks[:, rows[:, None], columns]


def map_columns(
    names: list[str], images: str, limit: int, kind: str, p: float, trust_code: bool = False
) -> tuple[np.ndarray, list[NetworkMaps], list[str]]:
    """Images (K, H, W, 3), a column of the figure for each network, and notes for the user.

    Each network gets the images at its own input size. The `kind` gradient adds the map of
    `gradient_map` to those of kind sum. The kind `attention` shows the stages that have attention;
    for a network without attention, maps of kind sum are shown.

    Raises:
        UserError: if there are no images, a name is neither a run nor a model, or a network does
            not take the images.
    """
    networks, size = load_at_own_sizes(names, trust_code)
    # Files are decoded at the largest input size of the networks.
    pictures = _open_images(images, limit, size)
    x = as_input(pictures.batch(slice(None)))
    columns, notes = [], []
    for name in names:
        column, note = _column(name, networks[name], x, kind, p)
        columns.append(column)
        notes += note
    for name, network in networks.items():
        if not network.is_trained:
            notes.append(f"{name} has no trained weights: its maps are those of random weights")
    return pictures.images.numpy(), columns, notes


def _column(
    name: str, network: Network, x: Tensor, kind: str, p: float
) -> tuple[NetworkMaps, list[str]]:
    """The column of a network, and notes for the user."""
    model = InferenceModel(network.module, network.preprocess, "fp32").eval()
    run_once(network, x[:1], name)  # its errors mention the network and the size
    layers = [stage.name for stage in model.stages((x.shape[-2], x.shape[-1]))]
    if not layers:
        raise UserError(f"{name} has no feature maps to draw")
    notes: list[str] = []
    map_kind = kind
    if kind == "gradient":
        map_kind = "sum"
    if kind == "attention":
        layers, map_kind = _attention_or_sum(model, layers, x)
        if map_kind == "sum":
            notes.append(f"{name} has no attention layers: its maps are of kind sum")
    with about(name):
        logits, maps = stage_maps(model, layers, x, map_kind, p)
    by_stage = {layer: m.numpy() for layer, m in zip(layers, maps, strict=True)}
    if kind == "gradient":
        by_stage["input gradient"] = gradient_map(model, x).numpy()
    if not network.is_trained:
        return (f"untrained {_title(name)}", None, by_stage), notes
    classes = [network.classes[i] for i in logits.argmax(1).tolist()]
    return (_title(name), classes, by_stage), notes


def _attention_or_sum(
    network: InferenceModel, layers: list[str], x: Tensor
) -> tuple[list[str], str]:
    """The layers with attention and the kind `attention`; if none, all layers and `sum`."""
    with_attention = [layer for layer in layers if has_attention(network, layer, x[:1])]
    if with_attention:
        return with_attention, "attention"
    return layers, "sum"


def has_attention(network: InferenceModel, layer: str, x: Tensor) -> bool:
    """Whether the attention of a layer can be read."""
    try:
        stage_maps(network, [layer], x, "attention")
    except UserError:
        return False
    return True


def gradient_map(network: InferenceModel, x: Tensor) -> Tensor:
    """|∂CE/∂x| of the predicted class, summed over channels (N, H, W), at the network's own size.

    x are images in [0, 1]; the gradient is taken with respect to the resized image before its
    normalisation.
    """
    inner = network.preprocess(x)
    with torch.no_grad():
        predicted = network.module(inner).argmax(1)
    gradient = input_gradient(network.module, inner, predicted)
    return (gradient / network.preprocess.get_buffer("std")).abs().sum(1)


def _title(name: str) -> str:
    """The last part of a name; for the run folder of a seed, also the parent folder."""
    parts = Path(name).parts
    if RunFolder(name).exists and parts[-1].startswith("seed-"):
        return "/".join(parts[-2:])
    return parts[-1]


def _open_images(images: str, limit: int, size: int) -> ImageSet:
    """At most `limit` images of a file, a folder or a data set; files are resized to `size`."""
    path = Path(images)
    if path.exists():
        files = image_files(path)[:limit]
        pixels = np.zeros((len(files), size, size, 3), dtype=np.uint8)
        decode_into(pixels, files.__getitem__, lambda i: str(files[i]), "error", may_skip=False)
        labels = torch.zeros(len(files), dtype=torch.int64)
        return ImageSet(torch.from_numpy(pixels), labels, ("",))
    # No training image is needed, and open_data takes at least one.
    val = open_data(images, limit_train=1, limit_val=limit).val
    return val.subset(torch.arange(len(val)))  # decodes the images of a stream
