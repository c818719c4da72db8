"""Reads state dicts from files, and loads them into networks."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from ..errors import UserError, first_few, nearest
from .authors_files import read_params
from .safe_load import is_plain, safe_load

SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".bin", ".ckpt", ".tar", ".pt7")
# Entries in which training scripts keep the weights. The average of the weights comes last, so
# that the weights themselves have priority.
ENTRIES = (
    *("state_dict", "model", "model_state_dict", "net", "network", "weights"),
    *("state_dict_ema", "model_ema"),
)
State = Mapping[str, Tensor]


def read_state_dict(file: str | Path, names: Container[str] = ()) -> dict[str, Tensor]:
    """The tensors of a weights file, or of the authors' `model.pt7`, by name.

    Reads entries such as `state_dict` or `model`, and removes prefixes that wrappers put before a
    network's `names`.

    Raises:
        UserError: for a missing or damaged file, another format, and one that would execute code.
    """
    file = Path(file)
    if file.is_dir():
        raise UserError(
            f"{file} is a folder: expected a file of weights (give a run folder as the teacher)"
        )
    if not file.is_file():
        neighbours = [f.name for f in file.parent.glob("*") if f.suffix in SUFFIXES]
        raise UserError(f"no weights file {file}{nearest(file.name, neighbours)}")
    if file.suffix not in SUFFIXES:
        raise UserError(f"{file}: expected a weights file that ends in {', '.join(SUFFIXES)}")
    if not file.stat().st_size:
        raise UserError(f"{file} is damaged: it is empty; copy it again")
    if file.suffix == ".pt7":
        return read_params(file)[0]
    state = safe_load(file, "model.state_dict() alone, or as safetensors")
    for entry in ENTRIES:
        if isinstance(state, Mapping) and isinstance(state.get(entry), Mapping):
            state = state[entry]
    state = dict(state) if isinstance(state, Mapping) else {}
    if "n_averaged" not in names:
        state.pop("n_averaged", None)  # a counter of torch.optim.swa_utils.AveragedModel
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        content = f"; it has {', '.join(map(str, list(state)[:5]))}" if state else ""
        raise UserError(
            f"{file} holds no state dict: expected tensors by name, or such a dictionary as "
            f"{' or '.join(ENTRIES)}{content}"
        )
    for name, tensor in state.items():
        if not is_plain(tensor):
            raise UserError(
                f"{file}: {name} is a tensor of {tensor.dtype}, {tensor.layout}, on "
                f"{tensor.device}: expected a dense tensor of real numbers"
            )
    return _strip_prefixes({str(name): value for name, value in state.items()}, names)


def _strip_prefixes(state: State, names: Container[str]) -> dict[str, Tensor]:
    """The state without the prefixes that wrappers put before a network's `names`."""
    unwrapped = {}
    for name, value in state.items():
        # The network itself may have a child named `module`.
        while name not in names and name.startswith(("module.", "_orig_mod.")):
            name = name.partition(".")[2]
        unwrapped[name] = value
    # A prefix that all names share, such as Lightning's `model.` or `backbone.`, is also removed if
    # the names after it are the network's.
    inner = unwrapped
    while not any(name in names for name in inner):
        prefixes = {name.partition(".")[0] for name in inner}
        if len(prefixes) > 1 or not all("." in name for name in inner):
            return unwrapped
        inner = {name.partition(".")[2]: value for name, value in inner.items()}
    return inner


def load_weights(model: nn.Module, file: str | Path) -> None:
    """Loads every weight of `model` from a file of tensors, or from the authors' `model.pt7`.

    Raises:
        UserError: for missing and unexpected keys and for other shapes; the message has the number
            of each and the first names.
    """
    load_state(model, read_state_dict(file, model.state_dict()), str(file))


def load_state(model: nn.Module, state: State, source: str) -> None:
    """As `load_weights`, from tensors by name; errors call them `source`."""
    # All tensors are checked before loading: PyTorch would load those that fit, and then raise.
    expected = model.state_dict()
    unexpected = [name for name in state if name not in expected]
    missing, misshapen = [], []
    for name, value in expected.items():
        if name in state and state[name].shape != value.shape:
            misshapen.append(f"{name} {tuple(state[name].shape)} for {tuple(value.shape)}")
        # PyTorch 0.3 and the authors' files lack this counter. No output depends on it.
        elif name not in state and not name.endswith("num_batches_tracked"):
            missing.append(name)
    names_by_fault = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    faults = []
    for fault, names in names_by_fault.items():
        if names:
            faults.append(f"{len(names)} {fault} ({first_few(names)})")
    if faults:
        mismatch = head_mismatch(expected, state)
        reason = ""
        if mismatch and not missing and not unexpected:
            numbers = f"{mismatch.classes} classes, the network's {mismatch.expected_classes}"
            reason = f"; its head has {numbers}"
        elif not expected.keys() & state.keys():
            reason = "; no name matches: they are the weights of another network"
        raise UserError(
            f"{source} does not fit {type(model).__name__}: {'; '.join(faults)}{reason}"
        )
    model.load_state_dict({name: state.get(name, value) for name, value in expected.items()})


def load_backbone(
    model: nn.Module, state: State, source: str, new_head: bool = False
) -> str | None:
    """As `load_state`, but a head for another number of classes is not loaded.

    With `new_head` the head is never loaded, because the classes are different. Returns a note for
    the user about a head that was not loaded, else None.
    """
    present = model.state_dict()
    mismatch = head_mismatch(present, state)
    if mismatch is not None:
        head = mismatch.names
        reason = f"has {mismatch.classes} classes, the data has {mismatch.expected_classes}"
    elif new_head:
        # Buffers belong to the head, such as the statistics of its normalisation.
        layers = {name.rpartition(".")[0] + "." for name in head_parameters(model, None)}
        head = [name for name in present if name.startswith(tuple(layers))]
        reason = "has other classes than the data"
    else:
        load_state(model, state, source)
        return None
    # The head keeps its tensors; all others have to fit.
    load_state(model, {**state, **{name: present[name] for name in head}}, source)
    return f"{source}: its head {reason}, so {first_few(head)} are initialised anew"


class HeadMismatch(NamedTuple):
    names: list[str]
    classes: int
    expected_classes: int


def head_mismatch(expected: State, state: State) -> HeadMismatch | None:
    """The tensors that differ in their first axis, the classes; None if any differs elsewhere."""
    names = [k for k in expected if k in state and expected[k].shape != state[k].shape]
    counts = set()
    for name in names:
        ours, theirs = expected[name], state[name]
        if not ours.ndim or not theirs.ndim or ours.shape[1:] != theirs.shape[1:]:
            return None
        counts.add((len(theirs), len(ours)))
    if len(counts) != 1:
        return None
    return HeadMismatch(names, *counts.pop())


def head_parameters(model: nn.Module, classes: int | None) -> list[str]:
    """The names of the classifier's parameters.

    timm names the layer. In other networks it is the last one with `classes` outputs (None: the
    last matrix), together with the layers registered after it, such as its normalisation.

    Raises:
        UserError: if no layer has that many outputs.
    """
    names = [name for name, _ in model.named_parameters()]
    config = getattr(model, "pretrained_cfg", None)  # {"classifier": "fc"}, or several names
    layers = config.get("classifier") if isinstance(config, Mapping) else None
    if layers:
        layers = (layers,) if isinstance(layers, str) else layers
        prefixes = tuple(f"{layer}." for layer in layers)
        head = [name for name in names if name.startswith(prefixes)]
        if head:
            return head
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.ndim > 1 and classes in (None, len(parameter)):
            return names[names.index(name) :]
    raise UserError(
        f"{type(model).__name__} has no layer of {classes} outputs, so its head is unknown"
    )
