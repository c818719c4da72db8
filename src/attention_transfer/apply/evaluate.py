"""Accuracy and cross-entropy of a network on a set of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Dataset, Images, StreamSet, default_workers, open_data, val_resize
from ..errors import UserError, first_few
from ..models.network import Network
from ..run_folder import RunFolder
from .inference import as_input
from .load import load_inference

EVALUATION_BATCH = 500
# Streamed images are large, and each worker has a few batches waiting.
STREAMED_BATCH = 128

Forward = Callable[[Tensor], Tensor]


def evaluate_run(run: Path, spec: str | None, limit: int | None, device: str) -> dict[str, Any]:
    """Loss and accuracy of a run's network on its own validation images, or on the data `spec`.

    Raises:
        UserError: for data with other classes, and for a run of the authors' script without
            `spec`, since such a run does not say where its data is.
    """
    network, model = load_inference(run, device)
    data = _open_val(network, run, spec, limit, device)
    if not network.matches_classes(data.classes):
        raise UserError(
            f"{run} has the classes {first_few(network.classes, 4)}; the data has "
            f"{first_few(data.classes, 4)}: expected the same"
        )
    metrics = evaluate(model, data.val.to(model.device), EVALUATION_BATCH, model.device)
    return {"run": str(run), "data": data.spec, **metrics, "images": len(data.val)}


def _open_val(
    network: Network, run: Path, spec: str | None, limit: int | None, device: str
) -> Dataset:
    config = RunFolder(run).config()
    options: dict[str, Any]
    if spec is not None:
        # Other data comes at the network's size; the run's own at the size that the run chose.
        size = network.preprocess.size
        options = {"image_size": size[0] if size else None}
    elif "data" in config:
        spec = str(config["data"])
        options = {key: config.get(key) for key in ("image_size", "limit_val", "val_split")}
    else:
        raise UserError(f"{run} does not say what data it is for: give --data")
    if limit is not None:
        options["limit_val"] = limit
    return open_data(
        spec,
        **options,
        limit_train=1,  # no training image is needed
        seed=config.get("seed", 0),
        on_bad_image=config.get("on_bad_image", "error"),
        workers=default_workers(on_cpu=device == "cpu"),
        val_resize=val_resize(config.get("augment", "crop")),
    )


def evaluate(
    forward: Forward, images: Images, batch_size: int, device: torch.device | str
) -> dict[str, float]:
    """Mean cross-entropy `loss`, `accuracy` in [0, 1], and `top5` if there are over 10 classes.

    Unreadable images do not count.
    """
    logits = predict_logits(forward, images, batch_size, device)
    labels = images.labels.to(device)
    if images.bad:
        readable = [i for i in range(len(images)) if i not in images.bad]
        logits, labels = logits[readable], labels[readable]
    metrics = {
        "loss": F.cross_entropy(logits, labels),
        "accuracy": (logits.argmax(1) == labels).float().mean(),
    }
    if len(images.classes) > 10:
        metrics["top5"] = (logits.topk(5).indices == labels[:, None]).any(1).float().mean()
    # One transfer from the device for all of them.
    values = torch.stack(list(metrics.values())).tolist()
    return dict(zip(metrics, values, strict=True))


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
