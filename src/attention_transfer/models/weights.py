"""State dicts from files, never by executing a pickle."""

from __future__ import annotations

import pickle
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError

SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".bin")


def read_state_dict(file: str | Path, names: Container[str] = ()) -> dict[str, Tensor]:
    """Tensors by name; a `state_dict` or `model` entry and a `module.` prefix that `names` lacks are seen through.

    Raises:
        UserError: for a file that is not there, of another kind, damaged, or that would execute code to load.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"no weights file {file}")
    if file.suffix not in SUFFIXES:
        raise UserError(f"{file}: expected a weights file that ends in {', '.join(SUFFIXES)}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} holds more than tensors, and pickles are not executed here: save model.state_dict() alone, or as "
            "safetensors"
        ) from error
    except Exception as error:
        raise UserError(
            f"{file} cannot be read as weights: {' '.join(str(error).split()[:20]) or type(error).__name__}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise UserError(
            f"{file} holds no state dict: expected tensors by name, or a 'state_dict' or 'model' entry of them"
        )
    return {_bare(str(k), names): v for k, v in found.items()}


def _bare(name: str, known: Container[str]) -> str:
    while name not in known and name.startswith(("module.", "_orig_mod.")):
        name = name.partition(".")[2]
    return name


def load_weights(model: nn.Module, file: str | Path) -> None:
    """Loads every weight of `model` from a file of tensors, or from the authors' `model.pt7`.

    Raises:
        UserError: where keys are missing, unexpected or of another shape; all are counted, the first ones named.
    """
    if Path(file).suffix == ".pt7":
        from .authors import authors_state

        load_state(model, authors_state(file), str(file))
    else:
        load_state(model, read_state_dict(file, model.state_dict()), str(file))


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads `state` into `model`; `source` is what a mismatch is said of, as by `load_weights`."""
    own = model.state_dict()
    # A count that nothing is computed from; PyTorch 0.3 and the authors' files do not have it.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    wrong = [
        f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    faults = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    if faults:
        raise UserError(f"{source} does not fit {type(model).__name__}: {'; '.join(faults)}")
    model.load_state_dict({k: state.get(k, v) for k, v in own.items()})
