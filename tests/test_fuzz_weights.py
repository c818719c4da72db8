"""Any file in the place of weights: it is loaded, or a line names it; no pickle executes."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import check_command, contents, fuzz, no_hang
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from attention_transfer.errors import UserError
from attention_transfer.models.create import create_model
from attention_transfer.models.weights import SUFFIXES, load_backbone, load_weights, read_state_dict

ENTRIES = ("state_dict", "model", "params", "net", "", "optimizer", "module")
SEEDS = st.integers(0, 10**6)
DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8),
    *(torch.bool, torch.complex64, torch.float8_e4m3fn),
)


class Executes:
    """Leaves a file behind where a pickle of it is executed."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(create_model("wrn-10-1", 10).state_dict())


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("mine")
    return tmp_path


def sparse(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_sparse() if tensor.ndim else tensor


def in_one_number(tensor: torch.Tensor) -> torch.Tensor:
    """The shape of a huge tensor, and the memory of one number."""
    return torch.zeros(()).expand(10**9, *tensor.shape[1:])


ODD = {
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": sparse,
    "expanded": in_one_number,
    "empty": lambda tensor: tensor[:0] if tensor.ndim else tensor,
    "scalar": lambda tensor: torch.tensor(1.0),
    "nan": lambda tensor: tensor.float() * float("nan"),
    "transposed": lambda tensor: tensor.mT if tensor.ndim > 1 else tensor,
    "number": lambda tensor: 1.0,
    "text": lambda tensor: "x",
    "nested": lambda tensor: {"weight": tensor},
    "numpy": lambda tensor: tensor.numpy(),
    "parameter": lambda tensor: torch.nn.Parameter(tensor.float()),
    "code": lambda tensor: Executes(),
}


@st.composite
def states(draw: Any, weights: dict[str, torch.Tensor]) -> Any:
    """A state dict of the network with some of its names, shapes and types changed."""
    state: dict[Any, Any] = dict(weights)
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        name = draw(st.sampled_from(sorted(weights)))
        match draw(st.sampled_from(["drop", "rename", "type", "odd"])):
            case "drop":
                state.pop(name, None)
            case "rename":
                new = draw(st.text(max_size=8) | st.integers() | st.sampled_from(["", ".", "fc."]))
                state[new] = state.pop(name, torch.zeros(1))
            case "type":
                state[name] = weights[name].to(draw(st.sampled_from(DTYPES)))
            case "odd":
                state[name] = ODD[draw(st.sampled_from(sorted(ODD)))](weights[name])
    if draw(st.integers(0, 3)) == 0:
        state = {f"module.{name}": value for name, value in state.items()}
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        state = {draw(st.sampled_from(ENTRIES)): state}
    return state


def write(file: Path, state: Any, how: str) -> None:
    """Writes a state in a format; what the format cannot hold is left out."""
    if how == "safetensors":
        tensors = {}
        for name, value in state.items():
            dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
            if dense and value.device.type == "cpu" and value.numel() < 10**7:
                tensors[str(name)] = value.detach().contiguous().clone()
        file.write_bytes(save(tensors))
    elif how == "pickle":
        file.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=how == "zip")


def damage(file: Path, kind: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    content = bytearray(file.read_bytes())
    if kind == "cut":
        content = content[: random.integers(0, len(content) + 1)]
    elif kind == "flip":
        # Most of a file is numbers; its structure is at the ends.
        for _ in range(random.integers(1, 10)):
            place = int(len(content) * random.random() ** 4)
            if random.random() < 0.5:
                place = len(content) - 1 - place
            content[max(0, min(place, len(content) - 1))] ^= 1 << random.integers(0, 8)
    elif kind == "replace":
        content = bytearray(random.bytes(random.integers(0, 300)))
    file.write_bytes(content)


@fuzz(60)
@given(data=st.data())
def test_any_weights(place, weights, data):
    state = data.draw(states(weights))
    how = data.draw(st.sampled_from(["zip", "zip", "old", "pickle", "safetensors"]))
    suffix = data.draw(st.sampled_from([".pt", ".pt", *SUFFIXES]))
    if how == "safetensors":
        suffix = ".safetensors"
    file = Path(f"weights{suffix}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            write(file, state, how)
        except Exception:
            return  # torch does not write it, so nobody has such a file
        damage(
            file,
            data.draw(st.sampled_from(["none"] * 4 + ["cut", "flip", "replace"])),
            data.draw(SEEDS),
        )
        before = contents(place)
        for load in (
            read_state_dict,
            lambda file: load_weights(create_model("wrn-10-1", 10), file),
            lambda file: load_backbone(
                model := create_model("wrn-10-1", 7), read_state_dict(file, model.state_dict()), "w"
            ),
        ):
            check(load, file)
        assert contents(place) == before
    file.unlink()


def check(load: Any, file: Path) -> None:
    try:
        with no_hang():
            load(file)
    except UserError as error:
        text = str(error)
        assert (file.name in text or text.startswith("w")) and "weights_only" not in text, text


@fuzz(15, share=0.05)
@given(data=st.data())
def test_any_weights_in_a_command(place, weights, data):
    state = data.draw(states(weights))
    file = Path("weights.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            write(file, state, "zip")
        except Exception:
            return
    damage(file, data.draw(st.sampled_from(["none", "cut", "flip"])), data.draw(SEEDS))
    before = contents(place)
    line = "evaluate wrn-10-1 --weights weights.pt --data digits --limit-val 10 --device cpu"
    check_command(line.split(), lambda error: "weights.pt" in error)
    assert contents(place) == before
