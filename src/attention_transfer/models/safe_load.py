"""Reads files of tensors without executing a pickle."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ..errors import UserError, first_few
from .numpy_scalars import NUMPY_STAND_INS

# The scripts of timm and torchvision save options of these harmless types with the weights; other
# scripts save a metric that is a numpy scalar.
SAFE_TYPES: list[Any] = [argparse.Namespace, PosixPath, PurePosixPath, *NUMPY_STAND_INS]


def safe_load(file: Path, to_save: str) -> Any:
    """The content of a file of `torch.save`, or of a `.safetensors` file, on the CPU.

    If the file holds more than tensors, the error tells the user to save `to_save` instead.

    Raises:
        UserError: for a damaged file, another format, and a file that would execute code.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        with safe_globals(SAFE_TYPES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickle protocols other than 2
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # The files of `torch.save` begin with a zip archive, or a pickle of protocol 2 to 5.
        with open(file, "rb") as stream:
            begins = stream.read(2)
        is_torch_file = re.match(rb"PK|\x80[\x02-\x05]", begins)
        if file.suffix != ".safetensors" and not is_torch_file:
            raise UserError(
                f"{file} cannot be read as weights: expected what torch.save writes, or safetensors"
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            types = _refused_types(file, error)
            content = f" ({first_few(types)})" if types else ", or is damaged"
            raise UserError(
                f"{file} holds more than tensors{content}, and pickles are not executed here: "
                f"if you trust it, load it yourself and save {to_save}"
            ) from error
        # torch's messages are a number like `101`, or a paragraph about versions.
        reason = " ".join(str(error).split()[:20]) or type(error).__name__
        raise UserError(
            f"{file} is damaged or cut off ({reason}): copy or download it again"
        ) from error


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor can be copied into a layer."""
    if tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
        return False
    if tensor.layout != torch.strided:
        return False
    # A tensor that repeats one number may be larger than the memory of the machine.
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _refused_types(file: Path, error: pickle.UnpicklingError) -> list[str]:
    """The names of the classes and functions for which torch refused the file, if known."""
    try:
        with safe_globals(SAFE_TYPES):
            return sorted(get_unsafe_globals_in_checkpoint(file))
    except Exception:
        # Files from before torch 1.6 are no zip archives: torch's message has the first name.
        return re.findall(r"GLOBAL ([\w.]+) w", str(error))
