"""Reads `model.pt7` of the authors' scripts (szagoruyko/attention-transfer).

It is `{"params": {name: tensor}, "optimizer": ..., "epoch": ...}`. A convolution is named
`group0.block0.conv0`; in a distillation run every name starts with `student.` or `teacher.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from .safe_load import is_plain, safe_load


def read_params(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The tensors of the trained network and, in a distillation run, of the teacher.

    Their names are those of a `state_dict`.

    Raises:
        UserError: for a damaged file, one that holds more than tensors, and tensor names of which
            only some belong to a student or a teacher.
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
    # Teachers with folded batch normalisation have `conv_dim` instead of `convdim`.
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
        if not isinstance(value, Tensor) or not value.is_floating_point() or not is_plain(value):
            kind = getattr(value, "dtype", type(value).__name__)
            raise UserError(
                f"{file}: params[{name!r}] is of type {kind}: "
                "expected dense tensors of floating-point numbers by name"
            )
    return {str(name): value for name, value in params.items()}
