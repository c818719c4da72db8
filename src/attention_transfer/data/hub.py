"""`hub:OWNER/NAME`: a data set of the Hugging Face hub, by their library `datasets`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import UserError, nearest
from .decode import Encoded
from .labels import Labels, class_names, numbered
from .parquet import IMAGE_NAMES, LABEL_NAMES, VAL_NAMES
from .reader import Reader
from .source import Source, Split
from .stream import StreamSet


def open_hub(
    place: str,
    image_size: int | None,
    on_bad_image: str,
    want_val: bool,
    label: str | None = None,
    image: str | None = None,
) -> Source:
    """`place` is OWNER/NAME, or OWNER/NAME:CONFIGURATION; the library fetches it once, into a cache of its own.

    `image` and `label` name the columns; without them, they are found by their types: an Image, and a ClassLabel,
    whole numbers or words. Raises `UserError` without the library, and where there is no such data set or no network.
    """
    name, _, configuration = place.partition(":")
    parts = _fetched(name, configuration or None)
    train_name = next((part for part in ("train", *parts) if part in parts), None)
    if train_name is None:
        raise UserError(
            f"hub:{place} has no parts: expected train and, for validation, validation or test; check it"
        )
    image, label = find_columns(place, parts[train_name].features, image, label)

    def read(part: str, classes: tuple[str, ...], size: int | None) -> StreamSet:
        reader = HubReader(place, part, parts[part], image)
        labels = _labels(parts[part], label)
        classes = classes or class_names(labels)
        size = size or reader.usual_size()
        return StreamSet.whole(
            reader, numbered(reader, labels, classes), classes, size, on_bad_image
        )

    names = getattr(parts[train_name].features[label], "names", None)
    train = read(train_name, tuple(map(str, names)) if names else (), image_size)
    val_name = next((part for part in VAL_NAMES if part in parts and part != train_name), None)
    if not want_val or val_name is None:
        return Source(train.classes, train.size, Split.read(train), None)
    return Source(
        train.classes,
        train.size,
        Split.read(train),
        Split.read(read(val_name, train.classes, train.size)),
    )


def _fetched(name: str, configuration: str | None) -> dict[str, Any]:
    """The parts of the data set by their names."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"hub:{name} needs Hugging Face's datasets: pip install 'attention-transfer[hub]'"
        ) from None
    for library in ("datasets", "huggingface_hub"):  # they tell of every attempt
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        return dict(datasets.load_dataset(name, configuration))
    except Exception as error:
        # It raises its own errors, those of the network and those of file formats, none of which a traceback explains.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"cannot fetch {name} from the Hugging Face hub ({reason}): expected OWNER/NAME of a data set of images; "
            "check the name and the network, or name files that you have with parquet:PATH or folder:PATH"
        ) from error


def find_columns(
    place: str, features: Any, image: str | None = None, label: str | None = None
) -> tuple[str, str]:
    """The image column and the label column: those that are named, or else the only ones, or the usual ones."""
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    types = {name: str(getattr(feature, "dtype", "")) for name, feature in features.items()}
    images = [name for name in kinds if kinds[name] == "Image"]
    columns = ", ".join(f"{name} ({types[name] or kinds[name]})" for name in kinds)
    if not images:
        raise UserError(
            f"hub:{place} has no image column (its columns: {columns}): expected one of images; choose another"
        )
    classed = [name for name in kinds if kinds[name] == "ClassLabel"]
    numbers = [
        name
        for name in kinds
        if kinds[name] == "Value" and types[name].lstrip("u").startswith(("int", "bool"))
    ]
    words = [
        name
        for name in kinds
        if kinds[name] == "Value" and types[name] in ("string", "large_string")
    ]
    for what, name, known in (
        ("image", image, images),
        ("label", label, [*classed, *numbers, *words]),
    ):
        if name is not None and name not in known:
            raise UserError(
                f"hub:{place} has no {what} column {name!r} (its columns: {columns}){nearest(name, known)}"
            )
    image = image or _usual(images, IMAGE_NAMES)
    label = (
        label
        or _usual(classed, LABEL_NAMES)
        or next((name for name in LABEL_NAMES if name in (*numbers, *words)), None)
        or _usual(numbers, ())
        or _usual(words, ())
    )
    if image is None or label is None:
        what = "label" if label is None else "image"
        raise UserError(
            f"hub:{place} has no column that is surely the {what} (its columns: {columns}): "
            f"expected one called {what}, or say which, hub:{place}#{what}=COLUMN"
        )
    return image, label


def _usual(found: Sequence[str], names: Sequence[str]) -> str | None:
    return found[0] if len(found) == 1 else next((name for name in names if name in found), None)


def _labels(part: Any, label: str) -> Labels:
    values = part.with_format(None)[label][:]
    if any(isinstance(value, str) for value in values):
        return list(values)
    return np.array([-1 if value is None else value for value in values], dtype=np.int64)


class HubReader(Reader):
    """The images of one part, which the library maps into memory."""

    def __init__(self, place: str, name: str, part: Any, column: str) -> None:
        from datasets import Image

        self._place, self._name, self._column = place, name, column
        self._rows = (
            part.select_columns([column]).cast_column(column, Image(decode=False)).with_format(None)
        )

    def __len__(self) -> int:
        return len(self._rows)

    def encoded(self, i: int) -> Encoded:
        value = self._rows[i][self._column]
        if value is not None and value.get("bytes") is None and value.get("path"):
            with open(value["path"], "rb") as file:
                return file.read()
        return None if value is None else value["bytes"]

    def file(self, i: int) -> str:
        return f"{self._name}:{i}"

    def place(self, i: int) -> str:
        return f"hub:{self._place}, {self._name}, row {i}"
