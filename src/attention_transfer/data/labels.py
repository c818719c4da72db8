"""Labels as files have them, numbers or words, to the numbers of classes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError
from .reader import Reader

# Whole numbers, -1 where an image has no label; or words, None where it has none.
Labels = NDArray[np.int64] | list[str | None]


def class_names(labels: Labels) -> tuple[str, ...]:
    """Of words the words, sorted; of whole numbers all from 0 to the highest."""
    if isinstance(labels, list):
        return tuple(sorted({word for word in labels if word is not None}))
    return tuple(str(i) for i in range(1 + int(labels.max(initial=-1))))


def numbered(reader: Reader, labels: Labels, classes: tuple[str, ...]) -> Tensor:
    """Labels int64 (N,) of the reader's images; one that is no class is an error that says where it is."""
    if isinstance(labels, list):
        number: dict[str | None, int] = {name: i for i, name in enumerate(classes)}
        found = np.array([number.get(word, -1) for word in labels], dtype=np.int64)
    else:
        found = labels
    wrong = np.flatnonzero((found < 0) | (found >= len(classes)))
    if len(wrong):
        i = int(wrong[0])
        if isinstance(labels, list):
            what = f"the label {labels[i]!r} is none of the {len(classes)} classes"
        else:
            limit = "0 or more" if labels[i] < 0 else f"0 to {len(classes) - 1}"
            what = f"the label {labels[i]} is out of range, expected {limit}"
        raise UserError(f"{reader.place(i)}: {what}; correct it, or use a part that has labels")
    return torch.tensor(found)
