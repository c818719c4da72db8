"""Weights from elsewhere: what wraps them, what does not fit, a head of other classes."""

from __future__ import annotations

import argparse
import pathlib
import pickle
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from attention_transfer.errors import UserError
from attention_transfer.models.create import create_model
from attention_transfer.models.numpy_scalars import DtypeStandIn, read_scalar
from attention_transfer.models.safe_load import safe_load
from attention_transfer.models.weights import (
    ENTRIES,
    head_parameters,
    load_backbone,
    load_weights,
    read_state_dict,
)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


class TestWrappers:
    @pytest.mark.parametrize("entry", ENTRIES)
    def test_entries(self, tmp_path, entry):
        a, b = create_model("wrn-10-1", 3), create_model("wrn-10-1", 3)
        torch.save(
            {"epoch": 3, entry: a.state_dict(), "optimizer": {"state": {}}}, tmp_path / "w.pt"
        )
        load_weights(b, tmp_path / "w.pt")
        assert same(a.state_dict(), b.state_dict())

    def test_the_weights_themselves_before_their_average(self, tmp_path):
        a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        torch.save(
            {"state_dict_ema": b.state_dict(), "state_dict": a.state_dict()}, tmp_path / "w.pt"
        )
        assert same(read_state_dict(tmp_path / "w.pt"), a.state_dict())

    def test_an_averaged_model_with_its_count(self, tmp_path):
        a, b = create_model("wrn-10-1", 3), create_model("wrn-10-1", 3)
        torch.save({"model_ema": AveragedModel(a).state_dict()}, tmp_path / "w.pth")
        load_weights(b, tmp_path / "w.pth")
        assert same(a.state_dict(), b.state_dict())

    @pytest.mark.parametrize("prefix", ["backbone.", "model.", "module.net.encoder."])
    def test_a_prefix_that_all_names_share(self, tmp_path, prefix):
        a, b = create_model("wrn-10-1", 3), create_model("wrn-10-1", 3)
        state = {prefix + k: v for k, v in a.state_dict().items()}
        torch.save({"state_dict": state, "epoch": 1}, tmp_path / "w.ckpt")
        load_weights(b, tmp_path / "w.ckpt")
        assert same(a.state_dict(), b.state_dict())

    def test_a_prefix_of_some_names_is_part_of_them(self, tmp_path):
        torch.save({"a.weight": torch.zeros(1), "b.weight": torch.zeros(1)}, tmp_path / "w.pth.tar")
        assert list(read_state_dict(tmp_path / "w.pth.tar", ["weight"])) == ["a.weight", "b.weight"]

    def test_a_training_scripts_options_beside_them(self, tmp_path):
        args = argparse.Namespace(lr=0.1, output=pathlib.PosixPath("out"))
        torch.save({"model": nn.Linear(2, 2).state_dict(), "args": args}, tmp_path / "w.pth")
        load_weights(nn.Linear(2, 2), tmp_path / "w.pth")

    def test_options_that_would_execute_something(self, tmp_path):
        proof = tmp_path / "executed"

        class Explosive:
            def __reduce__(self):
                return pathlib.Path.touch, (proof,)

        args = argparse.Namespace(hook=Explosive())
        torch.save({"model": nn.Linear(2, 2).state_dict(), "args": args}, tmp_path / "w.pth")
        with pytest.raises(UserError, match="pickles are not executed"):
            load_weights(nn.Linear(2, 2), tmp_path / "w.pth")
        assert not proof.exists()


class TestOtherClasses:
    def test_the_error_has_both_numbers_of_classes(self, tmp_path):
        save_file(create_model("wrn-10-1", 7).state_dict(), tmp_path / "w.safetensors")
        with pytest.raises(
            UserError,
            match=r"fc.bias \(7,\) for \(3,\)\); its head has 7 classes, the network's 3",
        ):
            load_weights(create_model("wrn-10-1", 3), tmp_path / "w.safetensors")

    @pytest.mark.parametrize("name", ["wrn-10-1", "nin-thin"])
    def test_the_head_starts_anew(self, name):
        """NIN's classifier is a convolution with batch normalisation, all of the classes' width."""
        source, model = create_model(name, 7), create_model(name, 3)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        line = load_backbone(model, source.state_dict(), "w.pt")
        assert line is not None
        assert line.startswith(
            "w.pt: its head has 7 classes, the data has 3, so "
        ) and line.endswith("initialised anew")
        for key, value in model.state_dict().items():
            other = source.state_dict()[key]
            assert torch.equal(value, other if other.shape == value.shape else before[key]), key
        head = [k for k, v in before.items() if v.shape != source.state_dict()[k].shape]
        assert ", ".join(head[:3]) in line and len(head) == (2 if name == "wrn-10-1" else 6)

    def test_an_equal_number_of_other_classes(self):
        source, model = create_model("wrn-10-1", 3), create_model("wrn-10-1", 3)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        assert load_backbone(model, source.state_dict(), "run") is None
        assert same(model.state_dict(), source.state_dict())
        model.load_state_dict(before)
        line = load_backbone(model, source.state_dict(), "run", new_head=True)
        assert (
            line == "run: its head has other classes than the data, so fc.weight, fc.bias are "
            "initialised anew"
        )
        kept = [
            k
            for k, v in model.state_dict().items()
            if torch.equal(v, before[k]) and "num_batches" not in k
        ]
        assert {"fc.weight", "fc.bias"} <= set(kept) and "conv0.weight" not in kept

    def test_other_differences_are_errors(self):
        with pytest.raises(
            UserError, match=r"w.pt does not fit WideResNet: .*of another shape"
        ) as error:
            load_backbone(
                create_model("wrn-10-1", 3), create_model("wrn-10-2", 7).state_dict(), "w.pt"
            )
        assert "head knows" not in str(error.value)
        state = create_model("wrn-10-1", 7).state_dict()
        del state["conv0.weight"]
        with pytest.raises(UserError, match=r"1 missing \(conv0.weight\)"):
            load_backbone(create_model("wrn-10-1", 3), state, "w.pt")


class TestHead:
    @pytest.mark.parametrize(
        ("name", "head"),
        [
            ("wrn-10-1", ["fc.weight", "fc.bias"]),
            ("timm/resnet10t", ["fc.weight", "fc.bias"]),
            ("timm/mobilenetv3_small_050", ["classifier.weight", "classifier.bias"]),
            ("torchvision/squeezenet1_1", ["classifier.1.weight", "classifier.1.bias"]),
            ("torchvision/mobilenet_v3_small", ["classifier.3.weight", "classifier.3.bias"]),
        ],
    )
    def test_by_name(self, name, head):
        assert head_parameters(create_model(name, 7), 7) == head

    def test_its_normalisation_belongs_to_it(self):
        names = head_parameters(create_model("nin-thin", 7), 7)
        shapes = dict(create_model("nin-thin", 7).named_parameters())
        assert len(names) > 2 and all(len(shapes[n]) == 7 for n in names)

    def test_none(self):
        with pytest.raises(UserError, match="Linear has no layer of 7 outputs"):
            head_parameters(nn.Linear(3, 2), 7)


def test_a_factory_file_that_exits(tmp_path):
    (tmp_path / "net.py").write_text("import sys\nsys.exit('no weights here')\n")
    with pytest.raises(UserError, match=r"net.py, line 2: SystemExit: no weights here"):
        create_model(f"{tmp_path / 'net.py'}:make", 3)


class Custom:
    created = False

    def __setstate__(self, state):
        Custom.created = True

    def __getstate__(self):
        return {"a": 1}


class TestNumpyScalars:
    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize(
        "value",
        [
            *(np.float64(0.25), np.float32(0.1), np.float16(3), np.longdouble(2.5)),
            *(np.int64(-7), np.uint8(200), np.bool_(True), np.complex64(1 - 2j)),
            *(np.str_("loss é"), np.bytes_(b"ab"), np.dtype(">i4").type(5)),
        ],
    )
    def test_beside_the_weights(self, tmp_path, value, zipped):
        weights, file = {"w": torch.ones(2)}, tmp_path / "w.pt"
        content = {"state_dict": weights, "best": value, "history": [value, value]}
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        assert same(read_state_dict(file), weights)
        best = safe_load(file, "")["best"]
        assert best == value and type(best) is type(value)

    @pytest.mark.parametrize("value", [np.datetime64("2020-01-01"), np.arange(3)])
    def test_other_types_of_numpy_are_refused(self, tmp_path, value):
        torch.save({"w": torch.ones(2), "x": value}, tmp_path / "w.pt")
        with pytest.raises(UserError, match="holds more than tensors"):
            read_state_dict(tmp_path / "w.pt")

    def test_a_crafted_size_and_flags_are_ignored(self):
        dtype = DtypeStandIn("f8", False, True)
        dtype.__setstate__((3, "<", None, None, None, -8, -1, 0xFF))
        assert read_scalar(dtype, struct.pack("<d", 1.5)) == 1.5
        with pytest.raises(ValueError, match="buffer"):
            read_scalar(dtype, b"1234")


class TestBadFiles:
    """What is wrong, and what to do; torch only says `101` or `[Errno 22] Invalid argument`."""

    @pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
    def test_cut_off(self, tmp_path, name):
        state, file = nn.Linear(20, 20).state_dict(), tmp_path / name
        save_file(state, file) if name.endswith("rs") else torch.save(state, file)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(
            UserError, match=f"{name} is damaged or cut off .*: copy or download it again"
        ):
            read_state_dict(file)

    @pytest.mark.parametrize("content", [b"hello", b"<html>404</html>", bytes(range(200, 256))])
    def test_another_format(self, tmp_path, content):
        (tmp_path / "w.pt").write_bytes(content)
        with pytest.raises(
            UserError, match=r"w.pt cannot be read as weights: expected what torch.save writes"
        ):
            read_state_dict(tmp_path / "w.pt")

    def test_empty(self, tmp_path):
        (tmp_path / "w.pt").touch()
        with pytest.raises(UserError, match="w.pt is damaged: it is empty"):
            read_state_dict(tmp_path / "w.pt")

    def test_a_folder_and_a_misspelt_name(self, tmp_path):
        with pytest.raises(UserError, match="is a folder: expected a file of weights"):
            read_state_dict(tmp_path)
        (tmp_path / "weights.pt").touch()
        with pytest.raises(
            UserError, match="no weights file .*wieghts.pt; did you mean weights.pt"
        ):
            read_state_dict(tmp_path / "wieghts.pt")

    @pytest.mark.filterwarnings("error")
    def test_a_pickle_gives_one_error_and_no_warning(self, tmp_path):
        (tmp_path / "w.pt").write_bytes(pickle.dumps(pathlib.PurePosixPath.joinpath, protocol=4))
        with pytest.raises(
            UserError, match=r"holds more than tensors.*pickles are not executed.*if you trust it"
        ):
            read_state_dict(tmp_path / "w.pt")

    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_class_is_refused_by_its_own_name(self, tmp_path, zipped):
        torch.save(
            {"w": torch.zeros(1), "tensors": Custom(), "epoch": np.float64(1)},
            tmp_path / "w.pt",
            _use_new_zipfile_serialization=zipped,
        )
        Custom.created = False
        with pytest.raises(
            UserError, match=rf"more than tensors \({Custom.__module__}.Custom\), and pickles"
        ):
            read_state_dict(tmp_path / "w.pt")
        assert not Custom.created

    def test_weights_of_another_network(self, tmp_path):
        torch.save({"x.y": torch.zeros(1), "z": torch.zeros(1)}, tmp_path / "w.pt")
        with pytest.raises(
            UserError,
            match="2 missing .*2 unexpected .*no name matches: they are the weights",
        ):
            load_weights(nn.Linear(2, 2), tmp_path / "w.pt")

    @pytest.mark.parametrize("name", ["weight", "a.weight", "a.b.weight", "."])
    def test_a_single_tensor_that_fits_nothing(self, tmp_path, name):
        torch.save({name: torch.zeros(2)}, tmp_path / "w.pt")
        with pytest.raises(UserError, match="missing"):
            load_weights(create_model("wrn-10-1", 3), tmp_path / "w.pt")

    def test_the_error_lists_other_entries(self, tmp_path):
        torch.save({"mine": {"w": torch.zeros(1)}, "epoch": 3}, tmp_path / "w.pt")
        with pytest.raises(UserError, match=r"holds no state dict: .*; it has mine, epoch$"):
            read_state_dict(tmp_path / "w.pt")


class TestTensorsThatHoldNoNumbers:
    @pytest.mark.parametrize("name", ["w.pt", "w.pt7"])
    @pytest.mark.parametrize(
        "convert",
        [
            lambda t: t.to("meta"),
            lambda t: t.to_sparse(),
            lambda t: t.to(torch.cfloat),
            lambda t: torch.zeros(1).expand(t.shape),  # a small file, any size in memory
        ],
    )
    def test_the_tensor_is_named(self, tmp_path, name, convert):
        model = create_model("wrn-10-1", 3)
        state = dict(model.named_parameters()) | {"fc.weight": convert(model.fc.weight.detach())}
        torch.save({"params": state} if name == "w.pt7" else state, tmp_path / name)
        with pytest.raises(UserError, match=r"w\.pt.*fc\.weight.*expected"):
            load_weights(model, tmp_path / name)
