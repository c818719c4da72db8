"""The files of the authors' scripts (szagoruyko/attention-transfer): `log.txt` and `model.pt7`.

`log.txt` has a line `json_stats: {...}` per epoch, each with all options of the script. `model.pt7`
is `{"params": {name: tensor}, "optimizer": ..., "epoch": ...}`. A convolution is named
`group0.block0.conv0`; in a distillation run every name starts with `student.` or `teacher.`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from .safe_load import safe_load

MODEL_FILE, LOG_FILE = "model.pt7", "log.txt"
LOG_PREFIX = "json_stats:"
# Our export writes this option beside the authors': it describes classes and preprocessing.
EXTRA_KEY = "attention_transfer"


def is_authors_run(folder: str | Path) -> bool:
    """Whether the folder has the authors' `model.pt7`."""
    return (Path(folder) / MODEL_FILE).is_file()


def read_options(log: Path) -> dict[str, Any]:
    """The script's options from the first complete line of statistics; empty if all are cut short.

    Raises:
        UserError: for a file that is no text, or has no line of statistics.
    """
    try:
        lines = re.findall(rf"{LOG_PREFIX}(.*)", log.read_text())
    except UnicodeDecodeError as error:
        raise UserError(
            f"{log} is no text: expected the authors' log with lines {LOG_PREFIX} {{...}}"
        ) from error
    if not lines:
        raise UserError(f"{log} has no line {LOG_PREFIX} {{...}}: expected the authors' log")
    for line in lines:
        with contextlib.suppress(ValueError):  # a run that was killed has written half a line
            options = json.loads(line)
            if isinstance(options, dict):
                return options
    return {}


def read_params(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The tensors of the trained network and, in a distillation run, of the teacher.

    Their names are those of a `state_dict`.

    Raises:
        UserError: for a damaged file, one that holds more than tensors, and names of which only
            some belong to a student or a teacher.
    """
    student: dict[str, Tensor] = {}
    teacher: dict[str, Tensor] = {}
    other: dict[str, Tensor] = {}
    for name, tensor in _read_tensors(file).items():
        if name.startswith("student."):
            student[_state_dict_name(name.removeprefix("student."))] = tensor
        elif name.startswith("teacher."):
            teacher[_state_dict_name(name.removeprefix("teacher."))] = tensor
        else:
            other[_state_dict_name(name)] = tensor
    if not student and not teacher:
        return other, None
    if student and not other:
        return student, teacher or None
    fault = "no tensor of its student"
    if other:
        fault = f"the tensor {next(iter(other))} of neither"
    raise UserError(
        f"{file} has teacher. or student. names and {fault}: expected every name to start with one"
    )


def _state_dict_name(name: str) -> str:
    """`group1.block0.convdim` -> `group1.block0.convdim.weight`."""
    # Teachers with folded batch normalisation have `conv_dim` for `convdim`.
    name = re.sub(r"(^|\.)conv_dim(\.|$)", r"\1convdim\2", name)
    if name.rpartition(".")[2] in ("conv0", "conv1", "convdim"):
        return f"{name}.weight"
    return name


def _read_tensors(file: Path) -> dict[str, Tensor]:
    content = safe_load(file, '{"params": {name: tensor}} alone')
    params = content.get("params") if isinstance(content, Mapping) else None
    if not isinstance(params, Mapping) or not params:
        raise UserError(
            f'{file} holds no "params": expected the authors\' {{"params", "optimizer", "epoch"}}'
        )
    for name, value in params.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = getattr(value, "dtype", type(value).__name__)
            raise UserError(
                f"{file}: params[{name!r}] is of type {kind}: "
                "expected tensors of floating-point numbers by name"
            )
    return {str(name): value for name, value in params.items()}
