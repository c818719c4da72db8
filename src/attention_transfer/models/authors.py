"""Runs of the authors' own scripts (szagoruyko/attention-transfer): `log.txt` and `model.pt7`, read without a pickle.

`log.txt` has lines `json_stats: {...}`, an epoch each, every one with the script's options. `model.pt7` is
`{"params": {name: tensor}, "optimizer": ..., "epoch": ...}`; a convolution is named `group0.block0.conv0`, and in a
distillation run every name starts with `student.` or `teacher.`. Depth and width come from the tensors alone.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .authors_imagenet import AuthorsResNet, group_shapes, resnet_of
from .weights import load_state
from .wrn import WideResNet

MODEL_FILE, LOG_FILE = "model.pt7", "log.txt"
MARK = "json_stats:"
# Written by our export beside the authors' options: what a network that was not trained by their recipe needs.
OURS = "attention_transfer"

Triple = tuple[float, float, float]
CIFAR: tuple[Triple, Triple, tuple[int, int]] = (
    (125.3 / 255, 123.0 / 255, 113.9 / 255),
    (63.0 / 255, 62.1 / 255, 66.7 / 255),
    (32, 32),
)
IMAGENET: tuple[Triple, Triple, tuple[int, int]] = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
    (224, 224),
)


@dataclass
class AuthorsRun:
    """A run of the authors' scripts; of a distillation `model` is the student.

    `options` are those of the log's first line (empty where it is cut short). Images in [0, 1] of `image_size` are
    normalised by `mean` and `std`; `classes` are known only where our own export named them.
    """

    model: nn.Module
    teacher: nn.Module | None
    options: dict[str, Any]
    name: str
    teacher_name: str | None
    num_classes: int
    mean: Triple
    std: Triple
    image_size: tuple[int, int]
    classes: tuple[str, ...] | None = None


def is_authors_run(folder: str | Path) -> bool:
    """Whether the folder has the authors' `model.pt7`."""
    return (Path(folder) / MODEL_FILE).is_file()


def load_authors_run(folder: str | Path) -> AuthorsRun:
    """The networks of a run of the authors' CIFAR or ImageNet script, in eval mode, and its options.

    Raises:
        UserError: for files that are missing or damaged, a log without json_stats, tensors that fit none of their
            networks, a number of classes in the log that is not the tensors'.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder: expected a run of the authors' script, with {LOG_FILE} and {MODEL_FILE}"
        )
    for name in (LOG_FILE, MODEL_FILE):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}: expected a run of the authors' script, with that file"
            )
    options = _read_options(folder / LOG_FILE)
    file = folder / MODEL_FILE
    student, teacher = read_params(file)
    model, name, classes = _network(student, file)
    taught = None if teacher is None else _network(teacher, file)
    if taught is not None and taught[2] != classes:
        raise UserError(
            f"{file}: its student knows {classes} classes, its teacher {taught[2]}: expected the same"
        )
    if (said := options.get("num_classes")) is not None and said != classes:
        raise UserError(
            f"{folder}: {LOG_FILE} says num_classes {said}, the tensors of {MODEL_FILE} have {classes}: "
            "expected files of one run"
        )
    mean, std, size, names = _images(folder, options, model, classes)
    teacher_model, teacher_name = (None, None) if taught is None else taught[:2]
    return AuthorsRun(
        model, teacher_model, options, name, teacher_name, classes, mean, std, size, names
    )


def read_params(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The trained network's tensors, and of a distillation run the teacher's, by the names of a `state_dict`."""
    params = _read_tensors(file)
    parts: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}, "": {}}
    for name, tensor in params.items():
        side, dot, rest = name.partition(".")
        if dot and side in ("student", "teacher"):
            parts[side][_our_name(rest)] = tensor
        else:
            parts[""][_our_name(name)] = tensor
    alone = parts.pop("")
    if not any(parts.values()):
        return alone, None
    if alone or not parts["student"]:
        what = f"the tensor {next(iter(alone))} of neither" if alone else "no tensor of its student"
        raise UserError(
            f"{file} has teacher. or student. names and {what}: expected every name to start with one"
        )
    return parts["student"], parts["teacher"] or None


def authors_state(file: str | Path) -> dict[str, Tensor]:
    """The trained network of a `model.pt7` as a `state_dict`; of a distillation run, the student."""
    file = Path(file)
    if not file.is_file():
        raise UserError(f"no weights file {file}")
    return read_params(file)[0]


def _our_name(name: str) -> str:
    """`group1.block0.convdim` -> `group1.block0.convdim.weight`; the folded teacher's `conv_dim` is `convdim` too."""
    name = re.sub(r"(^|\.)conv_dim(\.|$)", r"\1convdim\2", name)
    return f"{name}.weight" if name.rpartition(".")[2] in ("conv0", "conv1", "convdim") else name


def _read_options(log: Path) -> dict[str, Any]:
    """The first line of statistics that can be read; empty where all are cut short."""
    try:
        lines = [
            part
            for line in log.read_text().splitlines()
            for _, mark, part in [line.partition(MARK)]
            if mark
        ]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{log} is no text: expected the authors' log with lines {MARK} {{...}}"
        ) from error
    if not lines:
        raise UserError(
            f"{log} has no line {MARK} {{...}}: expected the log of the authors' script"
        )
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {}


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} holds more than tensors, or is damaged, and pickles are not executed here: with the PyTorch that "
            'wrote it, save {"params": {name: tensor}} of it again'
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split()[:20]) or type(error).__name__
        raise UserError(f"{file} cannot be read, it may be cut short: {reason}") from error
    params = found.get("params") if isinstance(found, Mapping) else None
    if not isinstance(params, Mapping) or not params:
        raise UserError(
            f'{file} holds no "params": expected the authors\' {{"params", "optimizer", "epoch"}}'
        )
    for name, value in params.items():
        if (
            not isinstance(name, str)
            or not isinstance(value, Tensor)
            or not value.is_floating_point()
        ):
            what = f"of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UserError(
                f"{file}: params[{name!r}] is {what}: expected tensors of floating-point numbers by name"
            )
    return dict(params)


def _network(params: dict[str, Tensor], file: Path) -> tuple[nn.Module, str, int]:
    """The network that the tensors make, its name and its number of classes."""
    head = params.get("fc.weight")
    if head is None or head.ndim != 2 or not len(head):
        raise UserError(
            f"{file} has no fc.weight (classes, features): expected a network of the authors' scripts"
        )
    classes = len(head)
    module: nn.Module
    if any(name.startswith("group3.") for name in params):
        module, name = resnet_of(params, classes, file)
    else:
        depth, width = _depth_and_width(params, file)
        module, name = WideResNet(depth, width, classes), f"wrn-{depth}-{width}"
    load_state(module, params, f"{file}, taken for {name},")
    return module.eval(), name, classes


def _depth_and_width(params: Mapping[str, Tensor], file: Path) -> tuple[int, int]:
    blocks, widths = group_shapes(params, 3, file)
    if len(set(blocks)) > 1:
        raise UserError(
            f"{file}: its groups have {blocks} blocks: expected as many in each, a WRN's"
        )
    if widths[0] % 16 or widths != [widths[0], 2 * widths[0], 4 * widths[0]]:
        raise UserError(
            f"{file}: its groups are {widths} wide: expected 16k, 32k and 64k with a whole k, a WRN's"
        )
    return 6 * blocks[0] + 4, widths[0] // 16


def _images(
    folder: Path, options: Mapping[str, Any], model: nn.Module, classes: int
) -> tuple[Triple, Triple, tuple[int, int], tuple[str, ...] | None]:
    """Mean, standard deviation, size and class names: those of the script's recipe, or what our export wrote down."""
    if OURS not in options:
        return (*(IMAGENET if isinstance(model, AuthorsResNet) else CIFAR), None)
    try:
        own = options[OURS]
        (r, g, b), (s, t, u), (height, width) = own["mean"], own["std"], own["image_size"]
        names = tuple(str(name) for name in own["classes"])
        mean, std = (float(r), float(g), float(b)), (float(s), float(t), float(u))
        size = int(height), int(width)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / LOG_FILE}: its {OURS} entry lacks classes, mean, std or image_size"
        ) from error
    if len(names) != classes:
        raise UserError(
            f"{folder}: {LOG_FILE} names {len(names)} classes, the tensors of {MODEL_FILE} have {classes}"
        )
    return mean, std, size, names
