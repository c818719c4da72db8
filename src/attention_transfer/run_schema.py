"""The schema of the files of a run folder, for the fields that this package reads.

Any key may be missing or null, and other versions may write more keys. Values are checked once
against these types, so readers need not check them again.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from .errors import UserError

if TYPE_CHECKING:
    import numpy as np

Numbers = dict[str, float | None]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Side = Annotated[int, Field(ge=1, le=1 << 16)]
Name = Annotated[str, Field(pattern=r"^[^\x00]+$")]


class Config(BaseModel):
    """config.yaml: the recipe. Numbers may be text, since a person may write it (`lr: 5e-4`)."""

    model_config = ConfigDict(extra="allow")

    command: str | None = None
    model: Name | None = None
    teacher: Name | None = None
    method: str | None = None
    data: Name | None = None
    seed: Count | None = None
    epochs: Count | None = None
    batch_size: Count | None = None
    image_size: Side | None = None
    limit_val: Count | None = None
    val_split: float | None = None
    on_bad_image: Literal["error", "skip"] | None = None
    augment: Literal["crop", "imagenet"] | None = None
    lr: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    lr_decay: float | None = None
    milestones: list[int] | None = None
    temperature: float | None = None
    devices: Count | None = None
    nodes: Count | None = None


class Record(BaseModel):
    """A file that this package wrote, so a number as text means that it is damaged."""

    model_config = ConfigDict(extra="allow", strict=True)


class Auto(Record):
    """The choices of `auto` on the machine of the run."""

    device: str | None = None
    precision: Literal["fp32", "bf16"] | None = None
    compile: bool = False
    threads: Annotated[int, Field(ge=1, le=1 << 10)] | None = None
    graphs: bool = False


class Environment(Record):
    """environment.json."""

    versions: dict[str, Any] | None = None
    hardware: dict[str, Any] | None = None
    auto: Auto | None = None
    teacher: str | None = None
    streamed: bool | None = None
    store: str | None = None
    data: dict[str, Any] | None = None


class MetricsRow(Record):
    """A line of metrics.jsonl."""

    epoch: Count | None = None
    step: Count | None = None
    lr: float | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    train_accuracy: float | None = None
    val_accuracy: float | None = None
    val_top5: float | None = None
    parts: Numbers | None = None
    weights: Numbers | None = None
    gradients: Numbers | None = None
    images_per_second: float | None = None
    seconds: float | None = None


class SavedRow(MetricsRow):
    """A row of the metrics in a checkpoint."""

    step: Count


class CheckpointNumbers(Record):
    """checkpoint.pt, without its tensors."""

    step: Count
    seconds: float
    lr: float
    seed: Count
    rows: list[SavedRow]
    unreadable: list[Count]


class InBox(Record):
    """The share of attention inside the objects' boxes, by stage."""

    stages: list[str] | None = None
    in_box: list[float | None] | None = None
    pointing: list[float | None] | None = None
    random_pointing: list[float | None] | None = None
    box_area: float | None = None
    images: Count | None = None


class NetworkFacts(Record):
    """The facts about a network in summary.json: the student, and under `teacher` the teacher."""

    model: str | None = None
    parameters: float | None = None
    flops: float | None = None
    inference: Numbers | None = None
    attention: InBox | None = None


class TeacherFacts(NetworkFacts):
    """The teacher in summary.json."""

    name: str | None = None
    folder: Name | None = None
    store: Name | None = None
    val_accuracy: float | None = None
    val_loss: float | None = None


class Summary(NetworkFacts):
    """summary.json."""

    command: str | None = None
    method: str | None = None
    data: str | None = None
    seed: Count | None = None
    epochs: Count | None = None
    classes: list[str] | None = None
    final: Numbers | None = None
    seconds: float | None = None
    images_per_second: float | None = None
    sha256: str | None = None
    teacher: TeacherFacts | None = None


class Metadata(Record):
    """The metadata of student.safetensors, all of it needed to use the network."""

    model: Name
    classes: list[str] = Field(min_length=1)
    mean: Annotated[list[float], Field(min_length=3, max_length=3)]
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]
    image_size: Annotated[list[Side], Field(min_length=2, max_length=2)]


class LoggerState(Record):
    """A logger in logs/state.json."""

    step: Count
    id: str | None


class LoggerStates(RootModel[dict[str, LoggerState]]):
    """logs/state.json."""


def validated(value: Any, schema: type[BaseModel], source: str | Path) -> dict[str, Any]:
    """`value`, checked against `schema`; `source` names its file (and line) in an error.

    Raises:
        UserError: for a value of another type; the message names the field.
    """
    try:
        read = schema.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    else:
        plain: dict[str, Any] = read.model_dump(exclude_unset=True)
        return plain
    field = ".".join(str(key) for key in first["loc"])
    subject = "it is"
    if field:
        subject = f"{field} is"
    expected = first["msg"].removeprefix("Input should be ")
    raise UserError(
        f"{source} is damaged: {subject} {reprlib.repr(first['input'])}, expected {expected}"
    )


# {array: (NumPy's letters for its kinds of numbers, its shape)}. A capital letter in a shape is the
# same size in the whole file, a small letter is any size. In names, N is any number.
ArraySchema = Mapping[str, tuple[str, str]]
MAPS: ArraySchema = {
    "images": ("u", "K H W 3"),
    "labels": ("iu", "K"),
    "boxes": ("iu", "K 4"),
    "classes": ("U", "C"),
    "predictions": ("iu", "K"),
    "stages": ("U", "s"),
    "map.N": ("f", "K h w"),
    "teacher.predictions": ("iu", "K"),
    "teacher.stages": ("U", "s"),
    "teacher.map.N": ("f", "K h w"),
}
PREDICTIONS: ArraySchema = {
    "labels": ("iu", "N"),
    "student": ("iu", "N"),
    "teacher": ("iu", "N"),
    "classes": ("U", "C"),
}
KINDS = {"u": "whole numbers from 0", "iu": "whole numbers", "f": "numbers", "U": "texts"}


def validated_arrays(
    arrays: Mapping[str, np.ndarray], schema: ArraySchema, source: str | Path
) -> None:
    """Checks the arrays of a file against `schema`; any array may be missing.

    Raises:
        UserError: for an array of a wrong kind or shape; the message names it.
    """
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        expected = schema.get(re.sub(r"\.\d+$", ".N", name))
        if expected is None:
            continue
        kinds, shape = expected
        if array.dtype.kind not in kinds or not _fits(array.shape, shape.split(), sizes):
            wanted = shape.replace(" ", ", ")
            raise UserError(
                f"{source} is damaged: {name} is an array of {array.dtype} of the shape "
                f"{array.shape}, expected {KINDS[kinds]} of the shape ({wanted})"
            )


def _fits(shape: tuple[int, ...], expected: list[str], sizes: dict[str, int]) -> bool:
    """Whether a shape is as expected; adds the sizes with a capital letter to `sizes`."""
    if len(shape) != len(expected):
        return False
    for size, name in zip(shape, expected, strict=True):
        if name.isdigit() and size != int(name):
            return False
        if name.isupper() and size != sizes.setdefault(name, size):
            return False
        if size == 0 and name not in ("K", "N", "C"):
            return False
    return True
