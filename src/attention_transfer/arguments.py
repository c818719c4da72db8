"""Checks of the arguments of public functions; each error names the argument in one line.

Types, shapes, dtypes and devices are always checked. Values are checked only if that does not wait
for a device: in eager mode on a CPU.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .errors import UserError, shown


def check_tensor(value: object, name: str, allow_meta: bool = False) -> None:
    """Raises `UserError` unless `value` is a dense tensor; on `meta` only with `allow_meta`."""
    if not isinstance(value, Tensor):
        raise UserError(f"{name} is an object of type {type(value).__name__}: expected a tensor")
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise UserError(f"{name} is a {kind} tensor: expected a dense one")
    if value.is_meta and not allow_meta:
        raise UserError(
            f"{name} is on the device meta, without values: expected a tensor with them"
        )


def check_floats(value: object, name: str, expected: str) -> None:
    """Raises `UserError` unless `value` is a tensor of floats with at least one value.

    `expected` names the shape, such as "(N, K)".
    """
    check_tensor(value, name)
    assert isinstance(value, Tensor)
    if not value.is_floating_point():
        raise UserError(f"{name} is {value.dtype}: expected a floating-point tensor {expected}")
    if 0 in value.shape:
        raise UserError(f"{name} has the empty shape {tuple(value.shape)}: expected {expected}")


def check_images(value: object, name: str, model: nn.Module | None = None) -> None:
    """Raises `UserError` unless `value` is a batch. A transform or network may accept integers.

    With a `model` on the device meta, the images may be on meta as well.
    """
    on_meta = model is not None and any(p.is_meta for p in model.parameters())
    check_tensor(value, name, allow_meta=on_meta)
    assert isinstance(value, Tensor)
    if value.ndim < 2 or 0 in value.shape:
        raise UserError(f"{name} has the shape {tuple(value.shape)}: expected images (N, C, H, W)")


def check_same_device(a: Tensor, name_a: str, b: Tensor, name_b: str) -> None:
    if a.device != b.device:
        raise UserError(
            f"{name_a} is on {a.device}, {name_b} on {b.device}: expected both on one device"
        )


def check_finite(result: Tensor, inputs: Mapping[str, Tensor], overflow: str) -> None:
    """Raises `UserError` if a result is not finite, naming the input that is not.

    `overflow` is the message if all inputs are finite. Nothing is checked on devices other than the
    CPU, in compiled code and under torch.func.
    """
    if not can_be_read(result) or result.isfinite().all():
        return
    for name, value in inputs.items():
        wrong = value.numel() - int(value.isfinite().sum())
        if wrong:
            raise UserError(
                f"{name}: {wrong} of {value.numel()} values are NaN or infinite: "
                "expected finite ones"
            )
    raise UserError(overflow)


def can_be_read(value: Tensor) -> bool:
    """Whether values can be read without waiting for a device, and are not traced."""
    if torch.compiler.is_compiling() or value.device.type != "cpu" or type(value) is not Tensor:
        return False
    return not torch._C._are_functorch_transforms_active()


def check_module(value: object, name: str) -> None:
    if not isinstance(value, nn.Module):
        raise UserError(f"{name} is {shown(value)}: expected a torch.nn.Module")


def check_transform(transform: object, name: str) -> None:
    if transform is not None and not callable(transform):
        raise UserError(f"{name} is {shown(transform)}: expected a function or a module")


def check_path(value: object, name: str) -> None:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise UserError(f"{name} is {shown(value)}: expected a path")


def check_weight(value: object, name: str) -> float:
    """The value, if it is a finite number ≥ 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise UserError(f"{name} is {shown(value)}: expected a finite number ≥ 0")
    return float(value)


def check_switch(value: object, name: str) -> bool:
    """The value, if it is True or False."""
    if not isinstance(value, int) or value not in (0, 1):
        raise UserError(f"{name} is {shown(value)}: expected True or False")
    return bool(value)
