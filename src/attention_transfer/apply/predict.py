"""Predicts the classes of image files with a run's network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.decode import decode_into
from ..data.transforms import val_resize
from ..errors import UserError, first_few
from ..models.network import load_trained
from ..run_folder import RunFolder
from .inference import as_input
from .load import image_files, inference_model

BATCH = 128


@torch.no_grad()
def predict_files(
    run: Path,
    paths: Sequence[Path],
    top: int = 5,
    device: str = "auto",
    trust_code: bool = False,
) -> list[dict[str, Any]]:
    """For each image `{"file", "predictions": [{"class", "probability"}, ...]}`, best class first.

    Args:
        run: a run folder, or one of the authors' script (whose classes are numbers).
        paths: image files, and folders of them at any depth. The shorter side of an image is
            resized to the run's size, and the centre is cropped.
        top: the maximum number of classes per image.
        trust_code: the run may name a network FILE.py:FACTORY.

    Raises:
        UserError: for a path without images, and for unreadable images, which it lists.
    """
    if top < 1:
        raise UserError(f"--top is {top}: expected at least 1")
    network = load_trained(run, trust_code)
    model = inference_model(network, device)
    size = network.image_size[0]
    # The same preprocessing as for the run's validation images.
    shorter = round(size * val_resize(RunFolder(run).config().get("augment", "crop")))
    # dict.fromkeys: a file that is named twice counts once.
    files = list(dict.fromkeys(file for path in paths for file in image_files(path)))
    rows: list[dict[str, Any]] = []
    bad: list[str] = []
    for start in range(0, len(files), BATCH):
        batch = files[start : start + BATCH]
        names = [str(file) for file in batch]
        images = np.zeros((len(batch), size, size, 3), dtype=np.uint8)
        sizes = decode_into(images, batch.__getitem__, names.__getitem__, "skip", shorter)
        bad += [name for name, (width, _) in zip(names, sizes, strict=True) if not width]
        if bad:
            continue  # only look for other unreadable files
        x = as_input(torch.from_numpy(images).permute(0, 3, 1, 2).to(model.device))
        for name, probabilities in zip(names, model(x).softmax(1).cpu(), strict=True):
            values, labels = probabilities.topk(min(top, len(network.classes)))
            predictions = [
                {"class": network.classes[label], "probability": value}
                for value, label in zip(values.tolist(), labels.tolist(), strict=True)
            ]
            rows.append({"file": name, "predictions": predictions})
    if bad:
        text = f"cannot read {len(bad)} of {len(files)} images ({first_few(bad, 5)})"
        raise UserError(f"{text}: expected whole images")
    return rows
