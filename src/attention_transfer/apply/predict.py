"""What a run's network sees in image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.decode import decode_into
from ..errors import UserError
from ..models import load_trained
from ..run_folder import RunFolder
from .evaluate import as_input
from .stages import image_files, inference_on, val_resize

BATCH = 128


def predict_files(
    run: Path, paths: Sequence[Path], top: int = 5, device: str = "auto"
) -> list[dict[str, Any]]:
    """For each image `{"file", "predictions": [{"class", "probability"}, ...]}`, the likeliest class first.

    Args:
        run: a run folder, or one of the authors' script (whose classes are numbers).
        paths: image files, and folders that are searched for them at any depth. An image is brought to the run's size
            by its shorter side and cut to its centre.
        top: so many classes at most.

    Raises:
        UserError: for a path without images, and for images that cannot be read: all of them are named.
    """
    if top < 1:
        raise UserError(f"--top is {top}: expected at least 1")
    network = load_trained(run)
    assert network.preprocess.size is not None, "a trained network knows its size"
    # A file that is named twice is looked at once.
    files = list(dict.fromkeys(file for path in paths for file in image_files(path)))
    inference, chosen = inference_on(network, run, device)
    shorter = round(network.preprocess.size[0] * val_resize(RunFolder(run).config()))
    size, top = network.preprocess.size[0], min(top, len(network.classes))
    found: list[dict[str, Any]] = []
    bad: list[Path] = []
    for start in range(0, len(files), BATCH):
        part = files[start : start + BATCH]
        images = np.zeros((len(part), size, size, 3), dtype=np.uint8)
        sizes = decode_into(images, part, lambda i, part=part: str(part[i]), "skip", shorter)  # type: ignore[misc]
        bad += [file for file, (width, _) in zip(part, sizes, strict=True) if not width]
        if bad:
            continue
        with torch.no_grad():
            logits = inference(as_input(torch.from_numpy(images).permute(0, 3, 1, 2).to(chosen)))
        likely = logits.softmax(1).topk(top)
        for file, values, labels in zip(
            part, likely.values.tolist(), likely.indices.tolist(), strict=True
        ):
            ranked = [
                {"class": network.classes[j], "probability": v}
                for v, j in zip(values, labels, strict=True)
            ]
            found.append({"file": str(file), "predictions": ranked})
    if bad:
        named = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
        raise UserError(
            f"cannot read {len(bad)} of {len(files)} images ({named}): expected whole images"
        )
    return found
