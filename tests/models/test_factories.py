"""Model files of one's own: what they may be, what is said of those that fail, and where."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision import models

from attention_transfer.errors import UserError
from attention_transfer.models.create import create_model, pretrained_classes
from attention_transfer.models.network import Network
from attention_transfer.models.start import check_network, load_network
from attention_transfer.models.trained import Preprocess

MINE = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import nn

size = 3

@dataclass
class Options:  # looks its own module up by name
    width: int = 4

class Net(nn.Module):
    def __init__(self, num_classes, make=lambda y, x: y):
        super().__init__()
        self.body, self.fc = nn.Conv2d(3, Options().width, 3), nn.Linear(4, num_classes)
        self.make = make
    def forward(self, x):
        return self.make(self.fc(self.body(x).mean((2, 3))), x)

def make(num_classes): return Net(num_classes)
def defaults(num_classes=7, width=3): return Net(num_classes)
def other(classes): return Net(classes)
def more(num_classes, width): return Net(num_classes)
def nothing(num_classes): Net(num_classes)
def pair(num_classes): return Net(num_classes, lambda y, x: (y, x))
def mapping(num_classes): return Net(num_classes, lambda y, x: {"logits": y})
def grid(num_classes): return Net(num_classes, lambda y, x: x)
def ten(): return Net(10)
def late(num_classes):
    return Net(num_classes, lambda y, x: y.nosuch)
def positional(num_classes, /): return Net(num_classes)
def torchs(num_classes):
    return nn.Conv2d("3", 4, 3)
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def network(name: str, classes: int = 5) -> Network:
    return Network(
        create_model(name, classes),
        name,
        tuple("abcdefghij"[:classes]),
        Preprocess((0.5,) * 3, (0.2,) * 3),
    )


class TestFactories:
    @pytest.mark.parametrize("factory", ["make", "defaults", "Net"])
    def test_good(self, mine, factory):
        assert create_model(f"{mine}:{factory}", 5).fc.out_features == 5

    @pytest.mark.parametrize(
        ("factory", "words"),
        [
            ("mkae", "has no function 'mkae'; did you mean make"),
            ("zzz", r"has no function 'zzz' \(it has Options, Net, make, defaults, other\)"),
            ("size", "mine.py:size is of type int: expected a function"),
            (
                "other",
                "mine.py:other cannot be called, missing a required argument: 'classes': exp",
            ),
            ("positional", "mine.py:positional cannot be called, .*num_classes"),
            (
                "more",
                "mine.py:more cannot be called, missing a required argument: 'width': expected",
            ),
            (
                "nothing",
                "returned a NoneType: expected a torch.nn.Module: is the return statement missing?",
            ),
            ("torchs", "mine.py, line 34: TypeError: "),
        ],
    )
    def test_unusable_factories(self, mine, factory, words):
        with pytest.raises(UserError, match=words):
            create_model(f"{mine}:{factory}", 5)

    def test_a_missing_file(self, mine):
        with pytest.raises(
            UserError,
            match="no model file .*mne.py: expected .* function make; did you mean mine.py",
        ):
            create_model(f"{mine.parent / 'mne.py'}:make", 5)

    def test_the_function_is_left_out(self, mine):
        with pytest.raises(
            UserError,
            match=r"or FILE.py:FACTORY; did you mean \S*mine.py:Options or .*mine.py:make\?",
        ):
            create_model(str(mine), 5)
        with pytest.raises(UserError, match=r"or FILE.py:FACTORY$"):
            create_model(str(mine.parent / "none.py"), 5)

    def test_neighbours_can_be_imported_and_their_errors_located(self, tmp_path):
        (tmp_path / "neighbour_of_it.py").write_text("def f():\n    raise OSError('one\\n two')\n")
        (tmp_path / "net.py").write_text(
            "from neighbour_of_it import f\ndef make(num_classes): return f()\n"
        )
        before = list(sys.path)
        with pytest.raises(UserError, match=r"neighbour_of_it.py, line 2: OSError: one two$"):
            create_model(f"{tmp_path / 'net.py'}:make", 5)
        assert sys.path == before
        del sys.modules["neighbour_of_it"]

    def test_two_files_of_one_name(self, tmp_path):
        for folder, width in (("a", 3), ("b", 4)):
            (tmp_path / folder).mkdir()
            text = f"def make(num_classes): return nn.Linear({width}, num_classes)\n"
            (tmp_path / folder / "net.py").write_text(f"from torch import nn\n{text}")
        assert [create_model(f"{tmp_path / f}/net.py:make", 5).in_features for f in "ab"] == [3, 4]

    def test_a_message_of_several_lines_is_one(self, tmp_path):
        (tmp_path / "net.py").write_text("\nraise ValueError('first\\n  second')\n")
        with pytest.raises(UserError, match=r"net.py, line 2: ValueError: first second$"):
            create_model(f"{tmp_path / 'net.py'}:make", 5)


class TestCheck:
    def test_good(self, mine):
        checked = network(f"{mine}:make")
        check_network(checked, torch.rand(2, 3, 8, 8), "the student x")
        assert not checked.module.training

    @pytest.mark.parametrize(
        ("factory", "words"),
        [
            ("pair", "the student x returns an object of type tuple of 2: expected logits"),
            ("mapping", "returns an object of type dict with .*: expected logits"),
            ("grid", r"returns torch.float32 \(2, 3, 8, 8\): expected logits"),
            ("ten", "returns logits of 10 classes, the data has 5"),
            (
                "late",
                r"fails on images of 8×8 \(mine.py, line 31\): AttributeError: 'Tensor' ",
            ),
        ],
    )
    def test_other_outputs_than_logits(self, mine, factory, words):
        with pytest.raises(UserError, match=words):
            check_network(network(f"{mine}:{factory}"), torch.rand(2, 3, 8, 8), "the student x")

    def test_images_that_are_too_small(self):
        """The third pooling has nothing left."""
        body = [m for _ in range(3) for m in (nn.Conv2d(3, 3, 1), nn.MaxPool2d(2))]
        small = Network(
            nn.Sequential(*body, nn.Flatten()), "x", ("a",), Preprocess((0.5,) * 3, (0.2,) * 3)
        )
        with pytest.raises(
            UserError, match="fails on images of 4×4: RuntimeError: .*give that as --image-size"
        ):
            check_network(small, torch.rand(2, 3, 4, 4), "x")


class TestNames:
    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("resnet18", "torchvision/resnet18 or timm/resnet18"),
            ("torchvison/resnet18:pretrained", "torchvision/resnet18:pretrained"),
            ("timm/resnet18:pretraind", "timm/resnet18:pretrained"),
            ("wrn-16", "wrn-16-2 or wrn-16-1"),
        ],
    )
    def test_suggestions(self, name, meant):
        with pytest.raises(
            UserError, match=rf"unknown model '{name}': expected wrn-.*; did you mean {meant}\?$"
        ):
            create_model(name, 10)


class TestPretrained:
    def test_no_network(self, monkeypatch):
        def fetch(*args, **kwargs):
            logging.getLogger("huggingface_hub.utils").warning("Retrying")
            raise FileNotFoundError("cannot find\nthe requested files")

        monkeypatch.setattr(timm, "create_model", fetch)
        with pytest.raises(
            UserError,
            match="timm/resnet18:pretrained could not be fetched: cannot find the requested",
        ):
            create_model("timm/resnet18:pretrained", 5)
        monkeypatch.setattr(models, "get_model", fetch)
        with pytest.raises(
            UserError,
            match="torchvision/resnet18:pretrained could not be fetched.*--teacher-weights",
        ):
            create_model("torchvision/resnet18:pretrained", 5)

    def test_a_damaged_file_in_the_cache(self, monkeypatch, tmp_path):
        file = tmp_path / "model.safetensors"
        file.write_bytes(b"cut short")
        monkeypatch.setattr(timm, "create_model", lambda *_, **__: load_file(file))
        with pytest.raises(UserError, match="timm/resnet18:pretrained could not be fetched: .*"):
            create_model("timm/resnet18:pretrained", 5)

    def test_no_pretrained_weights(self):
        bare = next(n for n in timm.list_models("resnet*") if not timm.is_model_pretrained(n))
        with pytest.raises(UserError, match=f"timm has no trained weights of '{bare}'"):
            create_model(f"timm/{bare}:pretrained", 5)

    def test_a_teacher_of_other_classes_is_refused_before_its_weights_are_fetched(
        self, monkeypatch
    ):
        monkeypatch.setattr(timm, "create_model", lambda *a, **k: pytest.fail("fetched"))
        with pytest.raises(UserError, match="has 1000 classes, the data has 2: fine-tune it first"):
            load_network("timm/resnet18:pretrained", ["a", "b"], (0.5,) * 3, (0.2,) * 3)

    @pytest.mark.parametrize("name", ["timm/resnt18", "torchvision/resnt18"])
    def test_an_unknown_name_of_a_teacher(self, name):
        assert pretrained_classes(f"{name}:pretrained") is None
        with pytest.raises(UserError, match="did you mean resnet18"):
            load_network(f"{name}:pretrained", ["a", "b"], (0.5,) * 3, (0.2,) * 3)

    def test_squeezenets_head_is_a_convolution(self, monkeypatch):
        monkeypatch.setattr(
            models, "get_model", lambda name, weights: models.squeezenet1_1(num_classes=1000)
        )
        model = create_model("torchvision/squeezenet1_1:pretrained", 5)
        assert model(torch.rand(1, 3, 64, 64)).shape == (1, 5)
