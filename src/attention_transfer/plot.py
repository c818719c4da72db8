"""Figures for notebooks: attention maps of any network, and the curves of runs.

    figure = at.plot.maps({"teacher": teacher, "student": student}, images)
    figure = at.plot.convergence(["runs/alone", "runs/at+kd"])

A notebook shows the figure; `figure.savefig("maps.png")` writes it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from .apply.inference import InferenceModel
from .apply.maps import has_attention, stage_maps
from .arguments import check_floats, check_module
from .errors import UserError, check_choice, shown
from .report import MapColumn, convergence_figure, maps_figure, read_run
from .run_folder import find_runs
from .second_order import input_gradient
from .taps import evaluating, try_stages, unwrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("sum", "max", "attention", "gradient")
METRICS = ("error", "loss", "parts")
SMALLEST_TILE = 8  # pixels


def maps(
    models: nn.Module | Mapping[str, nn.Module],
    images: Tensor,
    layers: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    *,
    kind: str = "sum",
    p: float = 2.0,
    classes: Sequence[str] | None = None,
    pictures: Tensor | None = None,
    tile: int = 128,
) -> Figure:
    """The attention maps of images, a row for each image and a column for each layer.

    Each map is divided by its l2 norm, as in `attention_map`. Its colours range from 0 to its own
    maximum, which is printed below it.

    Args:
        models: a network, or {name: network}, drawn side by side. They run in eval mode.
        images: (N, C, H, W), the input of the networks.
        layers: the names of layers, for all networks, or {name of a network: layers}. By default
            all stages (`at.stages`).
        kind: `sum` or `max` of |A|^p over the channels; `attention`: the attention of transformer
            blocks; `gradient`: the sum, and also |∂CE/∂image| of the predicted class, summed over
            channels.
        p: the exponent.
        classes: the names of the classes, to print the predicted class below the maps.
        pictures: (N, 3, H, W) in [0, 1], drawn instead of `images`. Without them, images with
            values outside [0, 1] are scaled from their own minimum and maximum.
        tile: the longer side of an image in the figure, in pixels.

    Returns:
        A matplotlib figure.

    Raises:
        UserError: (a ValueError) for images of a wrong shape, for a network without feature maps,
            and for unknown layers.
    """
    check_choice("kind", kind, KINDS)
    check_float_images(images, "images", "(N, C, H, W)")
    if pictures is not None:
        check_float_images(pictures, "pictures", "(N, 3, H, W)")
    if not isinstance(tile, int) or tile < SMALLEST_TILE:
        raise UserError(
            f"tile is {shown(tile)}: expected a whole number of pixels, at least {SMALLEST_TILE}"
        )
    if not isinstance(models, Mapping):
        check_module(models, "models")
        models = {"": models}
    if isinstance(layers, Mapping) and (unknown := sorted(layers.keys() - models.keys())):
        raise UserError(
            f"layers names the model {shown(unknown[0])}: expected {', '.join(map(shown, models))}"
        )
    columns = []
    for name, model in models.items():
        check_module(model, f"models[{name!r}]")
        chosen = layers
        if isinstance(layers, Mapping):
            chosen = layers.get(name)
        columns.append(_column(name, model, images, chosen, kind, p, classes))
    return maps_figure(columns, _as_pixels(images if pictures is None else pictures), tile)


def check_float_images(images: Tensor, name: str, shape: str) -> None:
    """Raises `UserError` for anything but floating-point images with four axes."""
    check_floats(images, name, shape)
    if images.ndim != 4:
        raise UserError(f"{name} has the shape {tuple(images.shape)}: expected {shape}")


def _column(
    name: str,
    model: nn.Module,
    images: Tensor,
    layers: Any,
    kind: str,
    p: float,
    classes: Sequence[str] | None,
) -> MapColumn:
    parameter = next(model.parameters(), images)
    x = images.to(parameter.device)
    module = unwrap(model)
    network = InferenceModel(module, nn.Identity(), "fp32")
    if layers is None:
        layers = [stage.name for stage in try_stages(module, x[:1])]
        if kind == "attention":
            layers = [layer for layer in layers if has_attention(network, layer, x[:1])]
    if not layers:
        raise UserError(f"{name or 'the model'} has no feature maps to draw: name its layers")
    reduction = kind
    if kind == "gradient":
        reduction = "sum"
    logits, drawn = stage_maps(network, layers, x, reduction, p)
    by_layer = {layer: _as_array(m) for layer, m in zip(dict.fromkeys(layers), drawn, strict=True)}
    if kind == "gradient":
        with evaluating(module):
            gradient = input_gradient(module, x, logits.argmax(1))
        by_layer["input gradient"] = _as_array(gradient.abs().sum(1))
    predictions = None
    if classes is not None:
        if len(classes) != logits.shape[1]:
            raise UserError(f"there are {len(classes)} classes for {logits.shape[1]} logits")
        predictions = [str(classes[i]) for i in logits.argmax(1).tolist()]
    return MapColumn(name, predictions, by_layer)


def _as_array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _as_pixels(images: Tensor) -> np.ndarray:
    """Images (N, C, H, W) -> (N, H, W, 3) uint8; images without three channels are grey."""
    x = images.detach().float().cpu()
    if x.shape[1] != 3:
        x = x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    if low.min() < 0 or high.max() > 1:
        x = (x - low) / (high - low).clamp_min(1e-12)
    return (255 * x).round().byte().permute(0, 2, 3, 1).numpy()


def convergence(
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], metric: str = "error"
) -> Figure:
    """The curves of runs by epoch; the seeds of one setting are drawn as a line with a band.

    Args:
        runs: run folders (also the authors'), or folders of them.
        metric: `error` (validation error, %), `loss` (cross-entropy of training and validation) or
            `parts` (the parts of the training loss, and the weights that a schedule changes).

    Returns:
        A matplotlib figure.

    Raises:
        UserError: (a ValueError) for a path without a run, and for runs without this metric.
    """
    check_choice("metric", metric, METRICS)
    if isinstance(runs, str | os.PathLike):
        runs = [runs]
    return convergence_figure([read_run(folder) for folder in find_runs(list(runs))], metric)
