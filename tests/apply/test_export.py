"""What `export` writes computes the same as the network of the run, read back elsewhere."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
import torch
from authors_files import resnet_params, write_run, wrn_params

import attention_transfer as at
from attention_transfer.apply import graph
from attention_transfer.apply.export import FORMATS, export_run
from attention_transfer.apply.graph import ONNX_PACKAGES
from attention_transfer.models.authors import load_authors_run
from attention_transfer.models.network import load_trained, metadata, save_student
from attention_transfer.models.start import load_network
from attention_transfer.models.trained import Preprocess
from attention_transfer.models.weights import load_weights
from attention_transfer.run_folder import RunFolder

CLASSES = ("cat", "dog", "emu")
INPUT = "images (N, 3, 24, 24), RGB, in [0, 1]; normalisation by mean and std is inside"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
CONFIG = {
    "command": "distill",
    "model": "wrn-10-2",
    "data": "cifar10:/d",
    "teacher": "runs/big",
    "lr": 0.2,
}
ROWS = [
    {
        "epoch": 1,
        "train_loss": 2.0,
        "val_accuracy": 0.25,
        "parts": {"at": 1.0},
        "weights": {"beta": 1000.0, "alpha": 0.9},
    },
    {
        "epoch": 2,
        "train_loss": 1.0,
        "val_accuracy": 0.5,
        "weights": {"at.beta": 500.0, "symmetry.beta": 1.0, "alpha": 0.9},
    },
]
ONNX = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ONNX_PACKAGES),
    reason="the extra onnx is not there",
)


def make_run(folder, model="wrn-10-2", rows=ROWS):
    """A finished run with a network that has running statistics of its own."""
    torch.manual_seed(0)
    run = RunFolder(folder)
    run.write_config(CONFIG | {"model": model})
    run.write_metrics(rows)
    module = at.create_model(model, len(CLASSES))
    with torch.no_grad():
        module(torch.randn(8, 3, 32, 32))
    about = metadata(model, CLASSES, Preprocess(MEAN, STD), (24, 24))
    save_student(run.student_file, module, about)
    return run.path


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def images(count, size=24):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def logits(run, x):
    network = load_trained(run)
    with torch.no_grad():
        return network.module(network.preprocess(x))


class TestSafetensors:
    def test_the_network(self, run, tmp_path):
        from safetensors import safe_open

        export_run(run, "safetensors", out := tmp_path / "deep" / "net.safetensors")
        other = at.create_model("wrn-10-2", 3).eval()
        load_weights(other, out)
        x = load_trained(run).preprocess(images(2))
        with torch.no_grad():
            torch.testing.assert_close(other(x), logits(run, images(2)))
        with safe_open(out, framework="pt") as file:
            about = json.loads(file.metadata()["attention_transfer"])
        assert (about["model"], about["classes"], about["image_size"]) == (
            "wrn-10-2",
            list(CLASSES),
            [24, 24],
        )
        assert "less mean, divided by std" in about["input"] and "RGB" in about["input"]
        assert about["mean"] == pytest.approx(MEAN) and about["std"] == pytest.approx(STD)

    def test_the_file_is_readable_by_others(self, run, tmp_path):
        (tmp_path / "plain").touch()
        export_run(run, "safetensors", out := tmp_path / "net.safetensors")
        assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode


class TestGraph:
    def test_pt2(self, run, tmp_path):
        export_run(run, "pt2", out := tmp_path / "net.pt2")
        extra = {"attention_transfer.json": ""}
        graph = torch.export.load(out, extra_files=extra).module()
        for count in (1, 2, 5):
            torch.testing.assert_close(
                graph(images(count)), logits(run, images(count)), rtol=1e-5, atol=1e-5
            )
        about = json.loads(extra["attention_transfer.json"])
        assert about["classes"] == list(CLASSES) and about["input"] == INPUT

    @pytest.mark.parametrize("name", ["timm/resnet10t", "torchvision/squeezenet1_1"])
    def test_networks_of_libraries(self, tmp_path, name):
        run = make_run(tmp_path / "run", name)
        export_run(run, "pt2", out := tmp_path / "net.pt2")
        graph = torch.export.load(out).module()
        torch.testing.assert_close(graph(images(3)), logits(run, images(3)), rtol=1e-4, atol=1e-5)

    @ONNX
    def test_onnx(self, run, tmp_path):
        import onnx
        import onnxruntime

        note = export_run(run, "onnx", out := tmp_path / "net.onnx")
        assert re.fullmatch(
            r"opset 18, onnxruntime differs from PyTorch by \d\.\de-\d+ at most", note
        )
        session = onnxruntime.InferenceSession(out)
        inputs = [(i.name, i.shape) for i in session.get_inputs()]
        assert inputs == [("images", ["batch", 3, 24, 24])]
        assert [(o.name, o.shape) for o in session.get_outputs()] == [("logits", ["batch", 3])]
        for count in (1, 2, 5):
            (found,) = session.run(["logits"], {"images": images(count).numpy()})
            torch.testing.assert_close(
                torch.from_numpy(found), logits(run, images(count)), rtol=1e-4, atol=1e-4
            )
        about = json.loads(session.get_modelmeta().custom_metadata_map["attention_transfer"])
        assert about["classes"] == list(CLASSES) and about["input"] == INPUT
        assert (about["output"], about["opset"]) == ("logits (N, 3)", 18)
        model = onnx.load(out)
        assert model.graph.input[0].doc_string == INPUT
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]

    @ONNX
    def test_onnx_that_computes_something_else(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(graph, "TOLERANCE", -1.0)
        with pytest.raises(at.RunError, match="other outputs in onnxruntime than in PyTorch"):
            export_run(run, "onnx", tmp_path / "net.onnx")
        assert list(tmp_path.iterdir()) == [run]

    def test_onnx_without_its_extra(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(at.UserError, match=re.escape("pip install 'attention-transfer[onnx]'")):
            export_run(run, "onnx", tmp_path / "net.onnx")
        assert not (tmp_path / "net.onnx").exists()

    def test_a_network_that_cannot_be_traced(self, tmp_path):
        (tmp_path / "net.py").write_text(
            "from torch import nn\n"
            "class Net(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.fc = nn.Linear(3, 3)\n"
            "    def forward(self, x):\n"
            "        y = self.fc(x.mean((2, 3)))\n"
            "        return y if float(y.sum()) > 0 else -y\n"
            "def make(): return Net()\n"
        )
        run = make_run(tmp_path / "run", f"{tmp_path}/net.py:make")
        with pytest.raises(
            at.UserError, match=r"net.py:make cannot be exported as a graph: \w+: "
        ) as error:
            export_run(run, "pt2", tmp_path / "net.pt2", trust_code=True)
        assert "\n" not in str(error.value)


def attention_of(run, x):
    """The attention map of each stage, on its grid."""
    network = load_trained(run)
    x = network.preprocess(x)
    layers = [stage.name for stage in at.stages(network.module, x)]
    with torch.no_grad():
        _, features = at.tap(network.module, layers)(x)
    return {k: at.attention_map(f).view(len(x), *f.shape[2:]) for k, f in features.items()}


class TestAttention:
    """`--with-attention`: the graph returns the map of each stage."""

    @pytest.mark.parametrize("name", ["wrn-10-2", "timm/resnet10t"])
    def test_pt2(self, tmp_path, name):
        run = make_run(tmp_path / "run", name)
        export_run(run, "pt2", out := tmp_path / "net.pt2", with_attention=True)
        extra = {"attention_transfer.json": ""}
        graph = torch.export.load(out, extra_files=extra).module()
        for count in (1, 3):
            found, maps = graph(images(count))
            torch.testing.assert_close(found, logits(run, images(count)), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(maps, attention_of(run, images(count)))
        assert json.loads(extra["attention_transfer.json"])["attention"]["stages"] == list(maps)

    @ONNX
    def test_onnx(self, run, tmp_path):
        import onnx
        import onnxruntime

        export_run(run, "onnx", out := tmp_path / "net.onnx", with_attention=True)
        session = onnxruntime.InferenceSession(out)
        outputs = {o.name: o.shape for o in session.get_outputs()}
        assert outputs == {
            "logits": ["batch", 3],
            "attention.group0": ["batch", 24, 24],
            "attention.group1": ["batch", 12, 12],
            "attention.group2": ["batch", 6, 6],
        }
        for count in (1, 3):
            expected = attention_of(run, images(count))
            for layer, values in expected.items():
                (found,) = session.run([f"attention.{layer}"], {"images": images(count).numpy()})
                torch.testing.assert_close(torch.from_numpy(found), values, rtol=1e-4, atol=1e-4)
        assert {node.domain for node in onnx.load(out).graph.node} == {""}

    @pytest.mark.parametrize("form", ["safetensors", "authors"])
    def test_weights_have_no_outputs(self, run, tmp_path, form):
        with pytest.raises(at.UserError, match="choose --format onnx or pt2"):
            export_run(run, form, tmp_path / "out", with_attention=True)


class TestInt8:
    @ONNX
    def test_the_numbers_are_those_of_the_file(self, command, student_run, tmp_path):
        import onnx
        import onnxruntime

        from attention_transfer.data.digits import open_digits

        line = f"export {student_run} --format onnx --int8 --with-attention"
        answer = command(f"{line} --calibration-images 40 --out net.onnx --json numbers.json")
        assert (answer.status, answer.err) == (0, "")
        numbers = json.loads((tmp_path / "numbers.json").read_text())
        assert (numbers["images"], numbers["calibration_images"]) == (100, 40)
        summary = json.loads((student_run / "summary.json").read_text())
        assert numbers["fp32"]["accuracy"] == pytest.approx(summary["final"]["val_accuracy"])
        assert abs(numbers["int8"]["accuracy"] - numbers["fp32"]["accuracy"]) <= 0.05
        assert numbers["int8"]["bytes"] == (tmp_path / "net.onnx").stat().st_size
        for precision in ("fp32", "int8"):
            error = 100 * (1 - numbers[precision]["accuracy"])
            assert f"{precision}: error {error:.2f} %, loss " in answer.out
        session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
        x = open_digits().val.batch(slice(0, 3)).contiguous().numpy().astype("float32") / 255
        found, *maps = session.run(None, {"images": x})
        expected = logits(student_run, torch.from_numpy(x))
        difference = torch.from_numpy(found) - expected
        assert 0 < difference.abs().max() < 0.1 * expected.abs().max()
        assert [m.shape for m in maps] == [(3, 32, 32), (3, 16, 16), (3, 8, 8)]
        model = onnx.load(tmp_path / "net.onnx")
        assert {node.domain for node in model.graph.node} == {""}
        weights = {w.name: w.data_type for w in model.graph.initializer}
        assert list(weights.values()).count(onnx.TensorProto.INT8) >= 12  # the convolutions
        about = json.loads(session.get_modelmeta().custom_metadata_map["attention_transfer"])
        assert about["precision"] == "int8" and "in [0, 1]" in about["input"]

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("--format pt2 --int8", "--int8 is for --format onnx: got --format pt2"),
            ("--format onnx --data digits", "--data is for --int8"),
            ("--format pt2 --calibration-images 9", "--calibration-images is for --int8"),
            ("--format pt2 --json n.json", "--json is for --int8"),
        ],
    )
    def test_options_that_do_not_go_together(self, command, run, tmp_path, words, message):
        answer = command(f"export {run} {words} --out net")
        assert answer.status == 2 and message in answer.err
        assert not (tmp_path / "net").exists()

    def test_data_with_other_classes(self, command, run):
        answer = command(f"export {run} --format onnx --int8 --data digits --out net.onnx")
        assert answer.status == 2 and "has 3 classes, the data has 10" in answer.err


class TestAuthors:
    def test_read_back(self, run, tmp_path):
        export_run(run, "authors", out := tmp_path / "theirs")
        loaded = load_authors_run(out)
        assert (loaded.name, loaded.teacher, loaded.classes) == ("wrn-10-2", None, CLASSES)
        assert loaded.options["n_parameters"] == sum(
            v.numel()
            for k, v in loaded.model.network.state_dict().items()
            if "num_batches" not in k
        )
        # With its own normalisation and size, not those of the authors' recipe.
        torch.testing.assert_close(
            logits(out, images(2, 30)), logits(run, images(2, 30)), rtol=0, atol=0
        )
        network = load_network(str(out), CLASSES, (0, 0, 0), (1, 1, 1))
        assert network.classes == CLASSES
        with pytest.raises(
            at.UserError, match="has the classes cat, dog, emu, the data has cat, dog, fox"
        ):
            load_network(str(out), ["cat", "dog", "fox"], (0, 0, 0), (1, 1, 1))

    def test_null_in_the_metrics_is_left_out(self, tmp_path):
        rows = [
            {"epoch": 1, "train_loss": None, "val_accuracy": 0.5, "parts": None, "weights": None}
        ]
        run = make_run(tmp_path / "run", rows=rows)
        export_run(run, "authors", out := tmp_path / "theirs")
        (line,) = (out / "log.txt").read_text().splitlines()
        epoch = json.loads(line.removeprefix("json_stats: "))
        assert epoch["test_acc"] == 50 and "train_loss" not in epoch

    def test_the_files_are_as_their_script_writes_them(self, run, tmp_path):
        export_run(run, "authors", out := tmp_path / "theirs")
        lines = [
            json.loads(line.removeprefix("json_stats: "))
            for line in (out / "log.txt").read_text().splitlines()
        ]
        assert [(line["epoch"], line["train_loss"], line["beta"]) for line in lines] == [
            (1, 2.0, 1e3),
            (2, 1.0, 500),
        ]
        first = lines[0]
        assert (first["depth"], first["width"], first["num_classes"], first["dataset"]) == (
            10,
            2,
            3,
            "CIFAR10",
        )
        assert (first["test_acc"], first["alpha"], first["teacher_id"]) == (25, 0.9, "big")
        saved = torch.load(out / "model.pt7", weights_only=True)
        assert list(saved) == ["params", "optimizer", "epoch"] and saved["epoch"] == 2
        assert list(saved["params"]) == list(wrn_params(10, 2, 3))
        learned = [
            v.clone().requires_grad_() for k, v in saved["params"].items() if "running" not in k
        ]
        optimizer = torch.optim.SGD(learned, 1.0, momentum=0.5)
        optimizer.load_state_dict(saved["optimizer"])
        assert optimizer.param_groups[0]["lr"] == 0.2

    def test_blocks_in_order(self, tmp_path):
        """The eleventh block comes after the tenth, not after the second."""
        export_run(make_run(tmp_path / "run", "wrn-70-1"), "authors", out := tmp_path / "theirs")
        assert list(torch.load(out / "model.pt7", weights_only=True)["params"]) == list(
            wrn_params(70, 1, 3)
        )
        torch.testing.assert_close(
            logits(out, images(1)), logits(tmp_path / "run", images(1)), rtol=0, atol=0
        )

    def test_another_network(self, tmp_path):
        run = make_run(tmp_path / "run", "timm/resnet10t")
        with pytest.raises(at.UserError, match="wrn-DEPTH-WIDTH only, .* holds timm/resnet10t"):
            export_run(run, "authors", tmp_path / "theirs")
        assert not (tmp_path / "theirs").exists()


class TestOfAnAuthorsRun:
    @pytest.mark.parametrize(
        "params", [wrn_params(10, 1), resnet_params([1, 1, 1, 1])], ids=["cifar", "imagenet"]
    )
    def test_graph(self, tmp_path, params):
        folder = write_run(tmp_path / "r", params)
        export_run(folder, "pt2", out := tmp_path / "net.pt2")
        size = 224 if "bn0.weight" in params else 32
        found = torch.export.load(out).module()(images(3, size))
        torch.testing.assert_close(found, logits(folder, images(3, size)), rtol=1e-4, atol=1e-5)

    def test_its_own_format(self, tmp_path):
        folder = write_run(tmp_path / "r", wrn_params(10, 1))
        with pytest.raises(at.UserError, match="is already a run of the authors' script: copy it"):
            export_run(folder, "authors", tmp_path / "theirs")


class TestOut:
    def test_a_file_is_replaced(self, run, tmp_path):
        for out in (tmp_path / "net", run / "net.safetensors"):
            for _ in range(2):
                export_run(run, "safetensors", out)
        (tmp_path / "empty").mkdir()
        export_run(run, "authors", tmp_path / "empty")

    @pytest.mark.parametrize("form", FORMATS)
    def test_a_folder_with_something_in_it(self, run, tmp_path, form):
        with pytest.raises(at.UserError, match="is a folder"):
            export_run(run, form, tmp_path)

    def test_a_file_for_a_folder(self, run, tmp_path):
        (tmp_path / "mine").write_text("mine")
        with pytest.raises(
            at.UserError, match="is a file: for the format authors name a new folder"
        ):
            export_run(run, "authors", tmp_path / "mine")
        assert (tmp_path / "mine").read_text() == "mine"

    def test_the_runs_own_file(self, run):
        before = (run / "student.safetensors").read_bytes()
        for name in ("student.safetensors", "config.yaml", "../run/checkpoint.pt"):
            with pytest.raises(at.UserError, match="is the run's own"):
                export_run(run, "pt2", run / name)
        assert (run / "student.safetensors").read_bytes() == before


def test_the_help_names_the_input(command):
    text = " ".join(command("export --help").out.split())
    assert "images (N, 3, H, W), RGB, in [0, 1]" in text


def test_the_command(command, run, tmp_path):
    answer = command(f"export {run} --format pt2 --out net.pt2")
    assert (answer.status, answer.err, answer.out) == (0, "", f"{run} as pt2: net.pt2\n")
    assert (tmp_path / "net.pt2").is_file()
    for line, text in (
        (f"export {run} --format pt --out x", "unknown format 'pt'"),
        (f"export {tmp_path} --format pt2 --out x", "is not a run folder"),
        (f"export {run} --format pt2", "--out"),
    ):
        answer = command(line)
        assert answer.status == 2 and text in answer.err and answer.err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_an_exported_teacher(command, teacher_run, tmp_path):
    """The files of the authors' format teach a student, and can be evaluated and looked at."""
    export_run(teacher_run, "authors", tmp_path / "theirs")
    line = (
        "distill --student wrn-10-1 --method at+kd --beta 1 --teacher theirs --out run "
        "--limit-train 64 --limit-val 20 --epochs 1 --batch-size 32 --device cpu --compile off"
    )
    answer = command(line)
    assert (answer.status, answer.err) == (0, "")
    answer = command(line)
    assert answer.status == 0 and "is finished" in answer.out
    exported = command("evaluate theirs --data digits --limit-val 100 --device cpu").out
    original = command(f"evaluate {teacher_run} --limit-val 100 --device cpu --precision fp32").out
    assert exported.partition(":")[2] == original.partition(":")[2] != ""
    assert "give --data" in command("evaluate theirs").err
    assert "--pairs group0=group0,group1=group1,group2=group2" in command("stages run theirs").out
    assert command("maps theirs run --images digits --limit 2 --out maps.png").status == 0
    (tmp_path / "theirs" / "model.pt7").write_bytes(b"other")
    assert "other weights of its teacher" in command(line).err
