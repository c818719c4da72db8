"""Which columns of a table hold the images and the labels."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest
from .labels import Labels
from .reader import Reader
from .spec import unique_names

# Names of columns that describe an image and are no labels: id, image_id, __key__, file_name.
NO_LABEL = re.compile(
    r"_*((image|img|sample)_)?(id|idx|index|key|uuid|file|file_?name|path|url|width|height)_*"
    r"|__index_level_0__",
    re.IGNORECASE,
)
FEWEST_IDS = 20  # with fewer rows, labels may all differ by chance
IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "category")
EXPECTED = {"image": "images as {bytes, path} or bytes", "label": "whole numbers or words"}


@dataclass(frozen=True)
class Columns:
    """The columns to read."""

    image: str
    label: str
    label_kind: str  # "number" or "word"
    classes: tuple[str, ...]  # names, () if there are none
    is_guess: bool = False  # whether the label column was chosen by its type only


def find_columns(
    schema: Any, where: str, spec: str, image: str | None = None, label: str | None = None
) -> Columns:
    """The columns that the user named, or else those that metadata, types and names suggest.

    Args:
        schema: a `pyarrow.Schema`.
        where, spec: the table, and the data spec to which the user can add #image=COLUMN, for
            error messages.

    Raises:
        UserError: if there is no such column, or more than one.
    """
    features = _hugging_face_features(schema.metadata)
    feature_types = {name: features.get(name, {}).get("_type") for name in schema.names}
    kinds = {field.name: _kind(field.type) for field in schema}
    images = [name for name in kinds if feature_types[name] == "Image"]
    images = images or [name for name in kinds if kinds[name] == "image"]
    numbers = [name for name in kinds if kinds[name] == "number"]
    words = [name for name in kinds if kinds[name] == "word"]
    class_labels = [name for name in numbers if feature_types[name] == "ClassLabel"]
    all_columns = ", ".join(f"{field.name} ({field.type})" for field in schema)

    def choose(role: str, given: str | None, candidates: list[str], guess: str | None) -> str:
        name = given or guess
        if name in candidates:
            return str(name)
        if given is not None:
            problem, remedy = f"no {role} column {given!r}", f"check it{nearest(given, candidates)}"
        elif not candidates:
            problem, remedy = f"no {role} column", "check it"
        elif len(candidates) == 1:
            problem = f"no {role} column, unless {candidates[0]!r} is one"
            remedy = f"name it, {spec}#{role}={candidates[0]}"
        else:
            problem = f"several {role} columns ({', '.join(candidates)})"
            remedy = f"name one, {spec}#{role}={candidates[0]}"
        raise UserError(
            f"{where} has {problem} (its columns: {all_columns}): "
            f"expected {EXPECTED[role]}; {remedy}"
        )

    declared = _single_or_usual(class_labels, LABEL_NAMES)
    declared = declared or _usual([*numbers, *words], LABEL_NAMES)
    guess = None
    for same_kind in (numbers, words):
        names = [name for name in same_kind if not NO_LABEL.fullmatch(name)]
        guess = guess or _single_or_usual(names)
    is_guess = label is None and declared is None
    image = choose("image", image, images, _single_or_usual(images, IMAGE_NAMES))
    label = choose("label", label, [*numbers, *words], declared or guess)
    classes = _declared_classes(features.get(label, {}))
    return Columns(image, label, kinds[label], classes, is_guess)


def _declared_classes(feature: dict[str, Any]) -> tuple[str, ...]:
    names = feature.get("names")
    if not isinstance(names, list):
        return ()
    labels = [str(label) for label in range(len(names))]
    return unique_names([str(name) for name in names], labels)


def check_guess(reader: Reader, labels: Labels, columns: Columns) -> None:
    """Raises `UserError` if a guessed label column has another value in each row, as ids have."""
    if columns.is_guess and FEWEST_IDS <= len(labels) == len(set(labels)):
        raise UserError(
            f"{reader.location(0)}: the column {columns.label!r} has a different value in each "
            f"row, like an id: expected labels; if it has labels, add #label={columns.label} to "
            "--data"
        )


def _single_or_usual(names: Sequence[str], usual: Sequence[str] = ()) -> str | None:
    if len(names) == 1:
        return names[0]
    return _usual(names, usual)


def _usual(names: Sequence[str], usual: Sequence[str]) -> str | None:
    return next((name for name in usual if name in names), None)


def _hugging_face_features(metadata: dict[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    """Features by column from the JSON in a schema's metadata, empty if there is none."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}
    if not isinstance(features, dict):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _kind(arrow_type: Any) -> str:
    """The kind of content of a column: "image", "number", "word", or "" for anything else."""
    from pyarrow import types

    if types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    if types.is_struct(arrow_type) and arrow_type.get_field_index("bytes") >= 0:
        arrow_type = arrow_type.field("bytes").type
    if types.is_binary(arrow_type) or types.is_large_binary(arrow_type):
        return "image"
    if types.is_integer(arrow_type) or types.is_boolean(arrow_type):
        return "number"
    if types.is_string(arrow_type) or types.is_large_string(arrow_type):
        return "word"
    return ""


def check_columns(schema: Any, columns: Columns, file: Path) -> None:
    """Raises `UserError` unless a file has the same columns and kind of labels as the first one."""
    kinds = {field.name: _kind(field.type) for field in schema}
    for name in (columns.label, columns.image):
        same = name == columns.image or kinds.get(name) == columns.label_kind
        if name not in kinds or not same:
            raise UserError(
                f"{file} has no column {name!r} of the same kind as train (its columns: "
                f"{', '.join(kinds)}): expected the same columns; check the file"
            )
