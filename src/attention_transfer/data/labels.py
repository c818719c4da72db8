"""Encodes the labels of the files, numbers or words, as class indices."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError
from .reader import Reader

# Whole numbers, -1 for an image without a label; or words, None for an image without a label.
Labels = NDArray[np.int64] | list[str | None]

# Allowed number of unnamed classes in small data, such as a few images of ImageNet.
MOST_EMPTY_CLASSES = 1000


def class_names(reader: Reader, labels: Labels) -> tuple[str, ...]:
    """The distinct words, sorted; for whole numbers, all from 0 to the highest.

    Raises:
        UserError: for a number that is larger than the number of images and 1,000.
    """
    if isinstance(labels, list):
        return tuple(sorted({word for word in labels if word is not None}))
    highest = int(labels.max(initial=-1))
    if highest >= max(len(labels), MOST_EMPTY_CLASSES):
        raise UserError(
            f"{reader.location(int(labels.argmax()))}: the label {highest} is too large for a "
            f"class number, counted from 0, with {len(labels)} images: correct it, name "
            "another label column, or give the classes names"
        )
    return tuple(str(i) for i in range(1 + highest))


def encode_labels(reader: Reader, labels: Labels, classes: tuple[str, ...]) -> Tensor:
    """Labels as int64 (N,). Raises `UserError` with the location of a label that is not a class."""
    if isinstance(labels, list):
        index: dict[str | None, int] = {name: i for i, name in enumerate(classes)}
        encoded = np.array([index.get(word, -1) for word in labels], dtype=np.int64)
    else:
        encoded = labels
    wrong = np.flatnonzero((encoded < 0) | (encoded >= len(classes)))
    if len(wrong):
        i = int(wrong[0])
        if isinstance(labels, list):
            problem = f"the label {labels[i]!r} is none of the {len(classes)} classes"
        elif labels[i] < 0:
            problem = f"the label {labels[i]} is out of range, expected 0 or more"
        else:
            problem = f"the label {labels[i]} is out of range, expected 0 to {len(classes) - 1}"
        raise UserError(
            f"{reader.location(i)}: {problem}; correct it, or use a split that has labels"
        )
    return torch.tensor(encoded)
