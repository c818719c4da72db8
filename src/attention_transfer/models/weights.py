"""State dicts from files, never by executing a pickle."""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
import warnings
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, nearest

SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".bin", ".ckpt", ".tar")
# Where training scripts keep the weights; an average of them is taken where nothing else is there.
ENTRIES = (
    "state_dict",
    "model",
    "model_state_dict",
    "net",
    "network",
    "weights",
    "state_dict_ema",
    "model_ema",
)
# What timm's and torchvision's scripts save beside them: values that loading does not execute.
PLAIN: list[Any] = [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath]


def read_state_dict(file: str | Path, names: Container[str] = ()) -> dict[str, Tensor]:
    """Tensors by name. Seen through are an entry like `state_dict` or `model`, a `module.` or `_orig_mod.` prefix that
    `names` lacks, and any other that all share where `names` has none of them (`backbone.`, Lightning's `model.`).

    Raises:
        UserError: for a file that is not there, of another kind, damaged, or that would execute code to load.
    """
    file = Path(file)
    _check_file(file)
    found = _read(file)
    for key in ENTRIES:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if isinstance(found, Mapping) and "n_averaged" in found and "n_averaged" not in names:
        found = {
            k: v for k, v in found.items() if k != "n_averaged"
        }  # torch.optim.swa_utils counts there
    if (
        not isinstance(found, Mapping)
        or not found
        or not all(isinstance(v, Tensor) for v in found.values())
    ):
        has = (
            f"; it has {', '.join(map(str, list(found)[:5]))}"
            if isinstance(found, Mapping) and found
            else ""
        )
        raise UserError(
            f"{file} holds no state dict: expected tensors by name, or an entry of them ({', '.join(ENTRIES)}){has}"
        )
    return _bare({str(k): v for k, v in found.items()}, names)


def _check_file(file: Path) -> None:
    if file.is_dir():
        raise UserError(
            f"{file} is a folder: expected a file of weights (a run's folder is a teacher itself)"
        )
    if not file.is_file():
        beside = (
            [f.name for f in file.parent.iterdir() if f.suffix in SUFFIXES]
            if file.parent.is_dir()
            else []
        )
        raise UserError(f"no weights file {file}{nearest(file.name, beside)}")
    if file.suffix not in SUFFIXES:
        raise UserError(f"{file}: expected a weights file that ends in {', '.join(SUFFIXES)}")
    if not file.stat().st_size:
        raise UserError(f"{file} is damaged: it is empty; copy it again")


def _read(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        with torch.serialization.safe_globals(PLAIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle's protocol
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not _starts_a_pickle(file):
            raise UserError(f"{file} {_NO_WEIGHTS}") from error
        found = re.findall(r"(?:GLOBAL |global )['\"`]?([\w.]+)", str(error))
        what = f" ({', '.join(dict.fromkeys(found))})" if found else ""
        raise UserError(
            f"{file} holds more than tensors{what}, and pickles are not executed here: if you trust it, load it "
            "yourself and save model.state_dict() alone, or as safetensors"
        ) from error
    except Exception as error:
        if file.suffix != ".safetensors" and not _starts_a_pickle(file):
            raise UserError(f"{file} {_NO_WEIGHTS}") from error
        why = " ".join(str(error).split()[:20]) or type(error).__name__
        raise UserError(
            f"{file} is damaged, cut off perhaps ({why}): copy or download it again"
        ) from error


_NO_WEIGHTS = "cannot be read as weights: expected what torch.save writes, or safetensors"


def _starts_a_pickle(file: Path) -> bool:
    """Whether a file begins as torch.save's do: a zip archive, or a pickle."""
    with open(file, "rb") as stream:
        return stream.read(2) in (b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6)))


def _bare(state: dict[str, Tensor], known: Container[str]) -> dict[str, Tensor]:
    """The state by the names that are known, without the prefixes of wrappers."""
    state = {_unwrapped(name, known): value for name, value in state.items()}
    inner = state
    while inner and not any(name in known for name in inner):
        shared = len({name.partition(".")[0] for name in inner}) == 1 and all(
            "." in name for name in inner
        )
        inner = {name.partition(".")[2]: value for name, value in inner.items()} if shared else {}
    return inner or state


def _unwrapped(name: str, known: Container[str]) -> str:
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
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", wrong),
        )
        if names
    ]
    if faults:
        why = ""
        if not missing and not unexpected and (head := other_head(own, state)) is not None:
            why = f"; its head knows {head[1]} classes, the network's {head[2]}"
        elif not any(k in own for k in state):
            why = "; no name is the network's own: they are another network's weights"
        raise UserError(f"{source} does not fit {type(model).__name__}: {'; '.join(faults)}{why}")
    model.load_state_dict({k: state.get(k, v) for k, v in own.items()})


def load_body(
    model: nn.Module, state: Mapping[str, Tensor], source: str, new_head: bool = False
) -> str | None:
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
        names, why = (
            [k for k in own if k.startswith(tuple(prefixes))],
            "its head knows other classes than the data's",
        )
    else:
        load_state(model, state, source)
        return None
    load_state(model, {**state, **{k: own[k] for k in names}}, source)
    return f"{source}: {why}, so {', '.join(names[:3])}{', …' if len(names) > 3 else ''} start anew"


def other_head(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> tuple[list[str], int, int] | None:
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
    said = (
        config.get("classifier")
        if isinstance(config, Mapping)
        else getattr(config, "classifier", None)
    )
    if said:
        said = (said,) if isinstance(said, str) else tuple(said)
        if found := [n for n in names if n.startswith(tuple(f"{s}." for s in said))]:
            return found
    for i, (_, parameter) in reversed(list(enumerate(model.named_parameters()))):
        if parameter.ndim > 1 and classes in (None, len(parameter)):
            return names[i:]
    raise UserError(
        f"{type(model).__name__} has no layer of {classes} outputs, which would be its head"
    )
