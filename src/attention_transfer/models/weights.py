"""State dicts from files, never by executing a pickle."""

from __future__ import annotations

import argparse
import pathlib
import pickle
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError

SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".bin")
# Where training scripts keep the weights; an average of them is taken where nothing else is there.
ENTRIES = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema")
# What timm's and torchvision's scripts save beside them: values that loading does not execute.
PLAIN: list[Any] = [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath]


def read_state_dict(file: str | Path, names: Container[str] = ()) -> dict[str, Tensor]:
    """Tensors by name; an entry like `state_dict` or `model` and a `module.` or `_orig_mod.` prefix that `names` lacks
    are seen through.

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
            with torch.serialization.safe_globals(PLAIN):
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
    for key in ENTRIES:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if isinstance(found, Mapping) and "n_averaged" in found and "n_averaged" not in names:
        found = {k: v for k, v in found.items() if k != "n_averaged"}  # torch.optim.swa_utils counts there
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
    load_state(model, file_state(model, file), str(file))


def file_state(model: nn.Module, file: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file, or of the authors' `model.pt7`, by the names that `model` has for them."""
    if Path(file).suffix == ".pt7":
        from .authors import authors_state

        return authors_state(file)
    return read_state_dict(file, model.state_dict())


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
        why = ""
        if not missing and not unexpected and (head := other_head(own, state)) is not None:
            why = f"; its head knows {head[1]} classes, the data has {head[2]}"
        raise UserError(f"{source} does not fit {type(model).__name__}: {'; '.join(faults)}{why}")
    model.load_state_dict({k: state.get(k, v) for k, v in own.items()})


def load_body(model: nn.Module, state: Mapping[str, Tensor], source: str, new_head: bool = False) -> str | None:
    """Loads `state` into `model` but for a head of another number of classes, which stays as it is; a line on that.

    Args:
        new_head: that the classes are others though they may be as many: the head stays as it is in any case.

    Raises:
        UserError: as `load_weights`, for what does not fit elsewhere.
    """
    own = model.state_dict()
    head = other_head(own, state)
    if head is not None:
        names, why = head[0], f"its head knows {head[1]} classes, the data has {head[2]}"
    elif new_head:
        found = head_parameters(model, None)
        prefixes = {n.rpartition(".")[0] + "." for n in found}
        names, why = [k for k in own if k.startswith(tuple(prefixes))], "its head knows other classes than the data's"
    else:
        load_state(model, state, source)
        return None
    load_state(model, {**state, **{k: own[k] for k in names}}, source)
    return f"{source}: {why}, so {', '.join(names[:3])}{', …' if len(names) > 3 else ''} start anew"


def other_head(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[list[str], int, int] | None:
    """(names, classes in `state`, classes in `own`) where shapes differ in the number of classes and nowhere else."""
    names = [k for k in own if k in state and own[k].shape != state[k].shape]
    if any(own[k].ndim == 0 or own[k].shape[1:] != state[k].shape[1:] for k in names):
        return None
    counts = {(len(state[k]), len(own[k])) for k in names if state[k].ndim}
    return (names, *counts.pop()) if len(counts) == 1 else None


def head_parameters(model: nn.Module, classes: int | None) -> list[str]:
    """The names of the classifier's parameters: what timm says, or else the last layer that puts out the classes.

    What is registered behind that layer (its normalisation, say) belongs to it. `classes` None: the last matrix.

    Raises:
        UserError: where no layer puts out so many classes.
    """
    names = [n for n, _ in model.named_parameters()]
    config = getattr(model, "pretrained_cfg", None)
    said = config.get("classifier") if isinstance(config, Mapping) else getattr(config, "classifier", None)
    if said:
        said = (said,) if isinstance(said, str) else tuple(said)
        if found := [n for n in names if n.startswith(tuple(f"{s}." for s in said))]:
            return found
    for i, (_, parameter) in reversed(list(enumerate(model.named_parameters()))):
        if parameter.ndim > 1 and classes in (None, len(parameter)):
            return names[i:]
    raise UserError(f"{type(model).__name__} has no layer of {classes} outputs, which would be its head")
