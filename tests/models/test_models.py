"""Networks by name, their weights, and what a run keeps of them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attention_transfer as at
from attention_transfer.models.create import create_model
from attention_transfer.models.network import load_student, metadata, run_fingerprint, save_student
from attention_transfer.models.start import load_network
from attention_transfer.models.trained import Preprocess
from attention_transfer.models.weights import load_weights
from attention_transfer.run_folder import RunFolder, write_json

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
CLASSES = ["cat", "dog", "emu"]
ABOUT = metadata("wrn-10-1", CLASSES, Preprocess(MEAN, STD), (16, 16))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in mine.items())


class TestWideResNet:
    @pytest.mark.parametrize(
        ("name", "count"),
        [
            ("wrn-16-1", 175_066),
            ("wrn-16-2", 691_674),
            ("wrn-40-1", 563_930),
            ("wrn-40-2", 2_243_546),
        ],
    )
    def test_published_sizes(self, name, count):
        assert parameters(create_model(name, 10)) == count

    def test_shapes(self):
        model, x = create_model("wrn-16-2", 7), torch.randn(2, 3, 32, 32)
        assert model(x).shape == (2, 7) and model(x[..., :20]).shape == (2, 7)
        assert [n for n, _ in model.named_children()][1:4] == ["group0", "group1", "group2"]

    @pytest.mark.parametrize(("name", "groups"), [("wrn-10-1", "12"), ("wrn-10-2", "012")])
    def test_a_shortcut_where_the_width_changes(self, name, groups):
        names = [n for n, _ in create_model(name, 10).named_modules() if n.endswith("convdim")]
        assert [name[5] for name in names] == list(groups)

    def test_forward_by_hand(self):
        """BN-ReLU feeds the convolutions and the 1×1 shortcut; the identity takes the input."""
        model, x = create_model("wrn-16-1", 4).eval(), torch.randn(2, 3, 8, 8)
        _, features = at.tap(model, ["conv0", "group0", "group1", "group1.block0", "group2"])(x)
        block, into = model.group1.block0, features["group0"]
        active = F.relu(block.bn0(into))
        expected = block.conv1(F.relu(block.bn1(block.conv0(active)))) + block.convdim(active)
        torch.testing.assert_close(features["group1.block0"], expected)
        block, into = model.group1.block1, features["group1.block0"]
        expected = block.conv1(F.relu(block.bn1(block.conv0(F.relu(block.bn0(into)))))) + into
        torch.testing.assert_close(features["group1"], expected)
        pooled = F.relu(model.bn(features["group2"])).mean((2, 3))
        torch.testing.assert_close(model(x), model.fc(pooled))

    def test_initial_weights_are_the_authors(self):
        torch.manual_seed(0)
        model = create_model("wrn-16-4", 100)
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
                fan_in = module.weight[0].numel()
                assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
            if isinstance(module, nn.BatchNorm2d):
                assert module.weight.min() >= 0 and module.weight.max() <= 1
                assert (module.bias == 0).all()
        assert model.fc.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
        assert (model.fc.bias == 0).all()
        assert model.group2.block0.bn1.weight.mean().item() == pytest.approx(0.5, abs=0.1)

    @pytest.mark.parametrize(
        ("name", "nearest"),
        [("wrn-17-1", "wrn-16-1"), ("wrn-4-2", "wrn-10-2"), ("wrn-38-1", "wrn-40-1")],
    )
    def test_depth(self, name, nearest):
        with pytest.raises(ValueError, match=rf"expected 6n \+ 4; the nearest is {nearest}"):
            create_model(name, 10)

    def test_width_and_classes(self):
        with pytest.raises(ValueError, match="width is 0, expected at least 1"):
            create_model("wrn-16-0", 10)
        with pytest.raises(ValueError, match="num_classes is 0"):
            create_model("wrn-16-1", 0)


class TestNames:
    @pytest.mark.parametrize("name", ["wrn-16", "wrn16-1", "WRN-16-1", "wrn-16-1 "])
    def test_the_nearest_is_named(self, name):
        with pytest.raises(ValueError, match=r"expected wrn-DEPTH-WIDTH.*did you mean wrn-16-\d"):
            create_model(name, 10)

    @pytest.mark.parametrize(
        "name", ["", "resnet18", "timm/resnet18:pretraind", "timm/", "model.py"]
    )
    def test_no_such_form(self, name):
        with pytest.raises(
            ValueError, match=r"expected wrn-DEPTH-WIDTH.*timm/NAME.*FILE.py:FACTORY"
        ):
            create_model(name, 10)

    @pytest.mark.parametrize("library", ["timm", "torchvision"])
    def test_libraries(self, library):
        with pytest.raises(ValueError, match="did you mean resnet18"):
            create_model(f"{library}/resnt18", 10)
        model = create_model(f"{library}/resnet18", 7)
        assert model.fc.out_features == 7


@pytest.fixture
def factories(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def make(num_classes): return nn.Linear(3, num_classes)\n"
        "def loose(**options): return nn.Linear(3, options['num_classes'])\n"
        "def fixed(): return nn.Linear(3, 2)\n"
        "def broken(num_classes):\n"
        "    raise KeyError('colour')\n"
        "def word(): return 'net'\n"
    )
    return file


class TestFactory:
    @pytest.mark.parametrize(("factory", "outputs"), [("make", 9), ("loose", 9), ("fixed", 2)])
    def test_good(self, factories, factory, outputs):
        assert create_model(f"{factories}:{factory}", 9).out_features == outputs

    def test_by_a_relative_path(self, factories, monkeypatch):
        monkeypatch.chdir(factories.parent)
        assert create_model("mine.py:make", 9).out_features == 9
        with pytest.raises(ValueError, match=r"mine.py, line 6: KeyError: 'colour'"):
            create_model("mine.py:broken", 9)

    def test_it_fails(self, factories):
        with pytest.raises(ValueError, match=r"mine.py, line 6: KeyError: 'colour'"):
            create_model(f"{factories}:broken", 9)
        with pytest.raises(ValueError, match=r"returned a str: expected a torch.nn.Module"):
            create_model(f"{factories}:word", 9)
        with pytest.raises(ValueError, match="no function 'mak'; did you mean make"):
            create_model(f"{factories}:mak", 9)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("def x(:\n", "line 1: SyntaxError"),
            ("\nimport nosuchthing\n", "line 2: ModuleNotFound"),
        ],
    )
    def test_the_file_fails(self, tmp_path, text, words):
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(ValueError, match=f"bad.py, {words}"):
            create_model(f"{tmp_path / 'bad.py'}:make", 9)

    def test_no_file(self, tmp_path):
        with pytest.raises(ValueError, match="no model file"):
            create_model(f"{tmp_path / 'none.py'}:make", 9)


class Explosive:
    """Unpickling it creates a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


class TestWeights:
    @pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".safetensors"])
    def test_round_trip(self, tmp_path, suffix):
        a, b = create_model("wrn-10-1", 3), create_model("wrn-10-1", 3)
        if suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(a.state_dict(), tmp_path / "w.safetensors")
        else:
            torch.save(a.state_dict(), tmp_path / f"w{suffix}")
        assert not same(a, b)
        load_weights(b, tmp_path / f"w{suffix}")
        assert same(a, b)

    @pytest.mark.parametrize(
        "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
    )
    @pytest.mark.parametrize("entry", [None, "state_dict", "model"])
    def test_entries_are_opened_and_prefixes_removed(self, tmp_path, prefix, entry):
        a, b = create_model("wrn-10-1", 3), create_model("wrn-10-1", 3)
        state = {prefix + k: v for k, v in a.state_dict().items()}
        torch.save({entry: state, "epoch": 3, "best": 0.5} if entry else state, tmp_path / "w.pt")
        load_weights(b, tmp_path / "w.pt")
        assert same(a, b)

    def test_a_networks_own_child_named_module(self, tmp_path):
        a = nn.ModuleDict({"module": nn.Linear(2, 2), "model": nn.Linear(2, 2)})
        b = nn.ModuleDict({"module": nn.Linear(2, 2), "model": nn.Linear(2, 2)})
        torch.save(a.state_dict(), tmp_path / "w.pt")
        load_weights(b, tmp_path / "w.pt")
        assert same(a, b)

    def test_misfits_are_counted_and_named(self, tmp_path):
        state = create_model("wrn-10-1", 3).state_dict()
        state["extra"] = state.pop("conv0.weight")
        state["fc.bias"] = torch.zeros(5)
        torch.save(state, tmp_path / "w.pt")
        model = create_model("wrn-10-1", 3)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ValueError, match="does not fit WideResNet") as error:
            load_weights(model, tmp_path / "w.pt")
        for words in (
            "1 missing (conv0.weight)",
            "1 unexpected (extra)",
            "1 of another shape (fc.bias (5,) for (3,))",
        ):
            assert words in str(error.value)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    @pytest.mark.parametrize("wrap", [False, True])
    def test_a_pickle_is_never_executed(self, tmp_path, wrap):
        proof = tmp_path / "executed"
        content: Any = Explosive(proof)
        if wrap:
            content = {"state_dict": {"w": torch.zeros(1)}, "hook": content}
        torch.save(content, tmp_path / "w.pt")
        (tmp_path / "raw.pth").write_bytes(pickle.dumps(content, protocol=2))
        for file in ("w.pt", "raw.pth"):
            with pytest.raises(ValueError, match="pickles are not executed|cannot be read"):
                load_weights(nn.Linear(1, 1), tmp_path / file)
        assert not proof.exists()

    def test_a_whole_module_is_refused(self, tmp_path):
        torch.save(nn.Linear(2, 2), tmp_path / "w.pt")
        with pytest.raises(ValueError, match=r"save model.state_dict\(\) alone"):
            load_weights(nn.Linear(2, 2), tmp_path / "w.pt")

    @pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "w.th"])
    @pytest.mark.parametrize("content", [b"", b"junk"])
    def test_damaged(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} "):
            load_weights(nn.Linear(2, 2), tmp_path / name)

    def test_no_file_and_another_kind(self, tmp_path):
        with pytest.raises(ValueError, match="no weights file"):
            load_weights(nn.Linear(2, 2), tmp_path / "w.pt")
        (tmp_path / "w.h5").touch()
        with pytest.raises(ValueError, match=r"ends in \.safetensors, \.pt"):
            load_weights(nn.Linear(2, 2), tmp_path / "w.h5")

    @pytest.mark.parametrize(
        "content", [[torch.zeros(1)], {"mine": {"w": torch.zeros(1)}}, {"epoch": 1}, {}]
    )
    def test_no_state_dict(self, tmp_path, content):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(ValueError, match="holds no state dict"):
            load_weights(nn.Linear(2, 2), tmp_path / "w.pt")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.write_config({"command": "train", "model": "wrn-10-1"})
    torch.manual_seed(3)
    module = create_model("wrn-10-1", 3)
    module(torch.randn(8, 3, 8, 8))  # running statistics of their own
    save_student(folder.student_file, module, ABOUT)
    folder.module = module
    return folder


class TestStudent:
    def test_round_trip(self, run):
        student = load_student(run.path)
        assert same(student.network, run.module) and not student.training
        assert student.class_names == tuple(CLASSES) and student.image_size == (16, 16)
        x = torch.rand(2, 3, 16, 16)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
        torch.testing.assert_close(student.preprocess(x), (x - mean) / std)
        assert student.preprocess(torch.rand(2, 3, 20, 30)).shape == (2, 3, 16, 16)
        expected = run.module.eval()((x - mean) / std)
        torch.testing.assert_close(student(x), expected)

    def test_the_lazy_name(self, run):
        assert same(at.load_student(run.path).network, run.module)

    def test_no_run_and_no_network_yet(self, tmp_path, run):
        for folder in (tmp_path / "none", tmp_path):
            with pytest.raises(ValueError, match="does not exist|is not a run folder"):
                load_student(folder)
        run.student_file.unlink()
        with pytest.raises(ValueError, match="not finished; run its command again"):
            load_student(run.path)

    def test_damaged(self, run):
        run.student_file.write_bytes(run.student_file.read_bytes()[:50])
        with pytest.raises(ValueError, match="damaged"):
            load_student(run.path)

    def test_other_weights_than_the_summary_describes(self, run):
        write_json(run.summary_file, {"sha256": run_fingerprint(run.path)})
        load_student(run.path)
        save_student(run.student_file, run.module, ABOUT | {"classes": ["a", "b", "c"]})
        with pytest.raises(ValueError, match="student.safetensors was damaged or replaced"):
            load_student(run.path)

    def test_an_unknown_model(self, run):
        save_student(run.student_file, run.module, ABOUT | {"model": "0"})
        with pytest.raises(ValueError, match="student.safetensors: unknown model '0'"):
            load_student(run.path)

    def test_a_file_of_another_program(self, run):
        from safetensors.torch import save_file

        save_file({"w": torch.zeros(1)}, run.student_file)
        with pytest.raises(ValueError, match="not written by attention-transfer"):
            load_student(run.path)

    def test_a_crash_while_writing_leaves_the_old_file(self, run, monkeypatch):
        before = run.student_file.read_bytes()
        monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk")))
        with pytest.raises(OSError, match="disk"):
            save_student(run.student_file, create_model("wrn-10-1", 3), ABOUT)
        assert run.student_file.read_bytes() == before
        assert [f.name for f in run.path.iterdir() if "partial" in f.name] == []


class TestTeacher:
    def test_a_run(self, run):
        network = load_network(str(run.path), CLASSES, MEAN, STD)
        assert same(network.module, run.module)
        assert (network.name, network.classes) == ("wrn-10-1", tuple(CLASSES))
        assert network.fingerprint == load_network(str(run.path), CLASSES, MEAN, STD).fingerprint
        assert not network.module.training

    def test_weights_from_a_file(self, run):
        network = load_network("wrn-10-1", CLASSES, MEAN, STD, str(run.student_file))
        assert same(network.module, run.module) and network.fingerprint

    def test_untrained(self):
        with pytest.raises(
            ValueError, match="no trained weights: give a run folder, or --teacher-weights"
        ):
            load_network("wrn-10-1", CLASSES, MEAN, STD)
        with pytest.raises(ValueError, match="no trained weights.*timm/resnet18:pretrained"):
            load_network("timm/resnet18", CLASSES, MEAN, STD)

    def test_other_classes(self, run):
        with pytest.raises(ValueError, match="has 3 classes, the data has 2"):
            load_network(str(run.path), CLASSES[:2], MEAN, STD)
        with pytest.raises(
            ValueError, match="has the classes cat, dog, emu, the data has cat, dog, fox"
        ):
            load_network(str(run.path), ["cat", "dog", "fox"], MEAN, STD)

    def test_weights_of_other_classes(self, run):
        with pytest.raises(
            ValueError,
            match=r"have 3 classes, the data has 4: fine-tune them first .*--student-weights",
        ):
            load_network("wrn-10-1", [*CLASSES, "fox"], MEAN, STD, str(run.student_file))

    def test_a_missing_folder(self, tmp_path):
        with pytest.raises(ValueError, match="no teacher at .*expected a run folder"):
            load_network(str(tmp_path / "none"), CLASSES, MEAN, STD)
        with pytest.raises(ValueError, match="is not a run folder: it has no config.yaml"):
            load_network(str(tmp_path), CLASSES, MEAN, STD)
