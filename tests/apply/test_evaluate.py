"""`evaluate`: any trained network on any images, against the network of the run by hand."""

from __future__ import annotations

import json

import pytest
import torch
from small_runs import write_factory, write_folder
from test_export import CLASSES, make_run

import attention_transfer as at
from attention_transfer.apply.evaluate import evaluate_network
from attention_transfer.apply.export import export_run
from attention_transfer.data.open import open_data
from attention_transfer.models.create import pretrained_images


@pytest.fixture
def data(tmp_path):
    """The specification of images of the classes of `make_run`, at another size than the run's."""
    folder = write_folder(tmp_path / "data", classes=len(CLASSES), train=4, val=3, size=20)
    (folder / "classes.csv").write_text(
        "".join(f"class{i:02},{name}\n" for i, name in enumerate(CLASSES))
    )
    return f"folder:{folder}"


def numbers(found):
    return found["accuracy"], found["loss"], found["images"]


def test_a_model_with_a_file_of_weights(tmp_path, data):
    """An exported file brings the normalisation and the size that its weights were trained with."""
    run = make_run(tmp_path / "run")
    expected = evaluate_network(str(run), data, device="cpu")
    export_run(run, "safetensors", tmp_path / "net.safetensors")
    weights = str(tmp_path / "net.safetensors")
    found = evaluate_network("wrn-10-2", data, weights, device="cpu")
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.02)  # resized twice, or once
    at_size = evaluate_network("wrn-10-2", data, weights, image_size=24, device="cpu")
    assert numbers(at_size) == pytest.approx(numbers(expected), rel=1e-5)


def test_other_weights_are_normalised_by_the_data(tmp_path, data):
    spec = write_factory(tmp_path)
    module = at.create_model(spec, len(CLASSES))
    torch.save(module.state_dict(), tmp_path / "net.pt")
    found = evaluate_network(spec, data, str(tmp_path / "net.pt"), device="cpu")
    opened = open_data(data)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (opened.mean, opened.std))
    with torch.no_grad():
        logits = module.eval()((opened.val.batch(slice(None)) / 255 - mean) / std)
    loss = torch.nn.functional.cross_entropy(logits, opened.val.labels)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert (found["images"], found["precision"]) == (9, "fp32")


def test_pretrained_images():
    assert pretrained_images("torchvision/resnet18:pretrained") == (224, 256 / 224)
    assert pretrained_images("timm/inception_v3:pretrained") == (299, 1 / 0.875)
    for name in ("timm/resnet18", "wrn-10-1", "timm/resnt18:pretrained"):
        assert pretrained_images(name) is None


def test_a_pretrained_model(monkeypatch, data):
    """Images come as the library prepares them; the classes are those of the data."""
    import timm

    create = timm.create_model
    monkeypatch.setattr("attention_transfer.models.start.pretrained_classes", lambda name: None)
    monkeypatch.setattr(timm, "create_model", lambda n, pretrained=False, **k: create(n, **k))
    sizes = []
    monkeypatch.setattr(
        "attention_transfer.apply.evaluate.check_network",
        lambda network, images, name: sizes.append(images.shape[-1]),
    )
    found = evaluate_network("timm/test_resnet:pretrained", data, device="cpu")
    assert found["images"] == 9
    assert sizes == [160]  # that of timm's configuration of these weights


class TestCommand:
    def test_a_model(self, command, tmp_path, data):
        run = make_run(tmp_path / "run")
        export_run(run, "safetensors", tmp_path / "net.safetensors")
        line = f"evaluate wrn-10-2 --weights net.safetensors --data {data} --image-size 24"
        said = command(f"{line} --json found.json --device cpu")
        expected = command(f"evaluate {run} --data {data} --device cpu")
        assert (said.status, said.err) == (0, "")
        assert said.out.partition(":")[2] == expected.out.partition(":")[2]
        assert said.out.endswith("on 9 images in fp32\n")
        found = json.loads((tmp_path / "found.json").read_text())
        assert (found["run"], found["precision"]) == ("wrn-10-2", "fp32")
        assert command(f"{line} --precision bf16 --device cpu").out.endswith("in bf16\n")

    @pytest.mark.parametrize(
        ("line", "text"),
        [
            (
                "timm/resnet18 --data {data}",
                "the network timm/resnet18 has no trained weights: give a run folder, "
                "timm/resnet18:pretrained, or --weights FILE",
            ),
            (
                "timm/resnet18:pretrained --data {data}",
                "the network timm/resnet18:pretrained has 1000 classes, the data has 3",
            ),
            ("timm/resnet18", "to evaluate a model by its name, add --data"),
            ("runs/none --data {data}", "no network at runs/none: expected a run folder, or"),
            ("wrn-10-2 --weights none.pt --data {data}", "no weights file none.pt"),
            ("wnr-10-2 --weights none.pt --data {data}", "unknown model 'wnr-10-2'"),
            ("run --weights net.pt", "leave --weights out"),
            ("run --image-size 32", "leave --image-size out"),
            ("run --precision fp16", "precision"),
        ],
    )
    def test_mistakes(self, command, tmp_path, data, line, text):
        make_run(tmp_path / "run")
        said = command(f"evaluate {line.format(data=data)}")
        assert said.status == 2 and text in said.err and said.err.count("\n") == 1
