"""Accuracy and cross-entropy of a network on a set of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.dataset import Images
from ..data.open import open_data
from ..data.stream import StreamSet, default_workers
from ..data.transforms import val_resize
from ..errors import UserError
from ..models.create import pretrained_images
from ..models.network import Network, load_trained
from ..models.start import check_network, load_network
from ..run_folder import RunFolder, is_folder_name, replacing
from .inference import as_input
from .load import inference_model
from .maps import attention_in_box, layer_names

EVALUATION_BATCH = 500
# Streamed images are large, and each worker prefetches a few batches.
STREAMED_BATCH = 128

Forward = Callable[[Tensor], Tensor]


def evaluate_network(
    name: str,
    spec: str | None = None,
    weights: str | None = None,
    image_size: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    trust_code: bool = False,
) -> dict[str, Any]:
    """Loss and accuracy of a trained network on validation images.

    If the data has boxes of objects, `attention` says how well the attention agrees with them.

    `name` is a run folder, or a model with trained weights as for a teacher. `spec` names the data,
    by default that of the run. `precision` is by default that of the run, and fp32 for models.
    `trust_code`: allow a run whose network is FILE.py:FACTORY; a `name` of that form is trusted
    in any case.

    Raises:
        UserError: for a network without trained weights, for data with other classes, and without
            `spec` if the data of the network is not known.
    """
    network = None
    if is_folder_name(name):
        network, options = run_and_data(name, spec, weights, image_size, trust_code)
    else:
        options = _model_options(name, spec, weights, image_size)
    if limit is not None:
        options["limit_val"] = limit
    data = open_data(**options, workers=default_workers(on_cpu=device == "cpu"))
    if network is None:
        network = load_network(name, data.classes, data.mean, data.std, weights, role="network")
        check_network(network, as_input(data.val.batch(slice(0, 2))), name)
    network.check_classes(data.classes, name)
    model = inference_model(network, device, precision)
    images = data.val.to(model.device)
    metrics = evaluate(model, images, EVALUATION_BATCH, model.device)
    about = {"images": len(data.val), "precision": model.precision}
    numbers = {"run": name, "data": data.spec, **metrics, **about}
    if images.boxes is not None:
        numbers["attention"] = attention_in_box(model, layer_names(model, images), images)
    return numbers


def run_and_data(
    run: str, spec: str | None, weights: str | None, image_size: int | None, trust_code: bool
) -> tuple[Network, dict[str, Any]]:
    """The network of a run, and the options of its validation images, or of other data."""
    for flag, value in (("--weights", weights), ("--image-size", image_size)):
        if value is not None:
            raise UserError(f"{run} is a run, which has weights and a size: leave {flag} out")
    network, config = load_trained(run, trust_code), RunFolder(run).config()
    options: dict[str, Any]
    if spec is not None:
        # Other data is resized to the network's size; the run's own data keeps the run's size.
        options = {"data": spec, "image_size": network.image_size[0]}
    elif "data" in config:
        options = {key: config.get(key) for key in ("data", "image_size", "limit_val", "val_split")}
    else:
        raise UserError(f"the data of {run} is not known: give --data")
    return network, options | {
        "limit_train": 1,  # no training image is needed
        "seed": config.get("seed", 0),
        "on_bad_image": config.get("on_bad_image", "error"),
        "val_resize": val_resize(config.get("augment", "crop")),
    }


def _model_options(
    name: str, spec: str | None, weights: str | None, image_size: int | None
) -> dict[str, Any]:
    """The options of the validation images for a model by name."""
    if spec is None:
        text = "does not exist as a run folder; to evaluate a model by its name, add --data"
        raise UserError(f"{name} {text}")
    options: dict[str, Any] = {"data": spec, "image_size": image_size}
    if weights is not None:
        # The normalisation may be the data's, which needs all training images.
        return options
    if (trained := pretrained_images(name)) is not None and image_size is None:
        options |= {"image_size": trained.size, "val_resize": trained.resize}
    return options | {"limit_train": 1}


def evaluate(
    forward: Forward, images: Images, batch_size: int, device: torch.device | str
) -> dict[str, float]:
    """Mean cross-entropy `loss`, `accuracy` in [0, 1], and `top5` if there are over 10 classes.

    Unreadable images do not count.
    """
    return measure(predict_logits(forward, images, batch_size, device), images)


def measure(logits: Tensor, images: Images) -> dict[str, float]:
    """As `evaluate`, from the logits (N, K) of the images."""
    logits, labels = readable(logits, images), readable(images.labels, images).to(logits.device)
    metrics = {
        "loss": F.cross_entropy(logits, labels),
        "accuracy": (logits.argmax(1) == labels).float().mean(),
    }
    if len(images.classes) > 10:
        metrics["top5"] = (logits.topk(5).indices == labels[:, None]).any(1).float().mean()
    # One transfer from the device for all of them.
    values = torch.stack(list(metrics.values())).tolist()
    return dict(zip(metrics, values, strict=True))


def readable(values: Tensor, images: Images) -> Tensor:
    """The rows of `values` (N, …) of images that could be read."""
    if not images.bad:
        return values
    return values[[i for i in range(len(images)) if i not in images.bad]]


def save_predictions(
    file: Path, images: Images, student: Tensor, teacher: Tensor | None = None
) -> None:
    """Writes the true classes of the images and those predicted by logits (N, K), as npz."""
    numbers = {"labels": images.labels, "student": student.argmax(1)}
    if teacher is not None:
        numbers["teacher"] = teacher.argmax(1)
    smallest = np.min_scalar_type(len(images.classes))
    arrays: dict[str, Any] = {
        name: readable(values, images).cpu().numpy().astype(smallest)
        for name, values in numbers.items()
    }
    with replacing(file) as partial, open(partial, "wb") as stream:
        np.savez_compressed(stream, classes=np.array(images.classes), **arrays)


@torch.no_grad()
def predict_logits(
    forward: Forward, images: Images, batch_size: int, device: torch.device | str
) -> Tensor:
    """Logits (N, K), float32, on the device; `forward` takes images (B, 3, H, W) in [0, 1]."""
    count = len(images)
    batch_size = min(batch_size, count)
    # The first images fill up the last batch, so that a compiled network sees one shape only.
    batches: Iterable[Tensor]
    if isinstance(images, StreamSet):
        batch_size = min(batch_size, STREAMED_BATCH)
        batches = images.batches(batch_size, pin=torch.device(device).type == "cuda")
    else:
        order = torch.arange(-(-count // batch_size) * batch_size, device=images.images.device)
        batches = (images.batch(index) for index in (order % count).split(batch_size))
    logits = [forward(as_input(x.to(device, non_blocking=True))).float() for x in batches]
    return torch.cat(logits)[:count]
