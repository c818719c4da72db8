"""`push`: what goes to the hub, and whether others can load it. No test uses the network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

import attention_transfer as at
from attention_transfer.apply.hub_code import loading_code
from attention_transfer.apply.model_card import public_name
from attention_transfer.models.network import Network, metadata, save_student
from attention_transfer.models.trained import Preprocess
from attention_transfer.run_folder import RunFolder, write_json

CLASSES = ("cat", "dog|<b>", "emu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
DOCS = Path(__file__).parents[2] / "docs"
SUMMARY = {
    "method": "at+kd",
    "data": "folder:/home/ann/photos",
    "flops": 1234567.0,
    "final": {
        "val_accuracy": 0.9,
        "val_top5": 0.98,
        "val_accuracy_fp32": 0.875,
        "val_top5_fp32": 0.96,
    },
    "teacher": {"model": "timm/resnet18", "val_accuracy": 0.95, "parameters": 11000000.0},
}
CONFIG = {"command": "distill", "teacher": "/home/ann/teacher", "method": "at+kd", "epochs": 7}
# What a stranger does with the card, in a process that has no attention_transfer.
STRANGER = """
import re, sys
sys.modules["attention_transfer"] = None  # an import of it fails
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

image = Image.open("image.png").convert("RGB")
images = to_tensor(image)[None]
found = {}
with torch.no_grad():
    for repo in sys.argv[1:]:
        (code,) = re.findall(r"```python\\n(.*?)```", open(f"{repo}/README.md").read(), re.DOTALL)
        names = {"image": image, "images": images}
        exec(code, names)
        found[repo] = names["logits"]
torch.save(found, "found.pt")
"""


def make_run(folder, model, size=32, summary=SUMMARY):
    torch.manual_seed(0)
    run = RunFolder(folder)
    run.write_config(CONFIG | {"model": model, "data": "folder:/home/ann/photos"})
    run.write_metrics([{"epoch": 7}])
    write_json(run.summary_file, summary)
    module = at.create_model(model, len(CLASSES))
    about = metadata(model, CLASSES, Preprocess(MEAN, STD), (size, size))
    save_student(run.student_file, module, about)
    return run.path


def fill_cache(cache, repo, folder):
    """The hub's cache as it is after a download of `folder`."""
    place = cache / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    (place / "snapshots").mkdir()
    (place / "snapshots" / ("a" * 40)).symlink_to(folder)


def test_a_stranger_loads_each_kind_of_student(command, tmp_path):
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "image.png")
    expected = {}
    for model in ("timm/resnet10t", "torchvision/squeezenet1_1", "wrn-10-1"):
        repo = f"ann/{model.rpartition('/')[2]}"
        run = make_run(tmp_path / "runs" / repo, model)
        answer = command(f"push {run} {repo} --dry-run --out {repo}")
        assert (answer.status, answer.err) == (0, "")
        assert f"the target without --dry-run: https://huggingface.co/{repo}" in answer.out
        fill_cache(tmp_path / "cache", repo, tmp_path / repo)
        with torch.no_grad():
            image = to_tensor(Image.open(tmp_path / "image.png"))
            expected[repo] = at.load_student(run)(image[None])
    (tmp_path / "stranger.py").write_text(STRANGER)
    offline = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "stranger.py", *expected],
        cwd=tmp_path,
        env=os.environ | offline | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for repo, logits in expected.items():
        torch.testing.assert_close(found[repo], logits, rtol=1e-4, atol=1e-5)


def test_the_files(command, tmp_path):
    make_run(tmp_path / "run", "timm/resnet10t")
    assert command("push run ann/small --dry-run").status == 0
    folder = tmp_path / "small"  # as --out is not given
    assert sorted(file.name for file in folder.iterdir()) == [
        *("README.md", "config.json", "model.safetensors")
    ]
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["label_names"]) == ("resnet10t", list(CLASSES))
    assert config["pretrained_cfg"]["mean"] == list(MEAN)
    assert "license" not in config["pretrained_cfg"]  # that of timm's own weights
    answer = command("push run ann/small --dry-run")
    assert answer.status == 2 and "is a folder that is not empty: name a new folder" in answer.err


def test_the_card(command, tmp_path):
    make_run(tmp_path / "run", "timm/resnet10t")
    command("push run ann/small --dry-run")
    card = (tmp_path / "small" / "README.md").read_text()
    assert "timm/resnet10t, 3 classes, trained on folder:photos" in card
    assert "with the teacher timm/resnet18 (method at+kd)" in card
    assert "| error | 12.50 % | 5.00 % |" in card
    assert "| top-5 error | 4.00 % | – |" in card
    assert "| FLOPs of one image | 1,234,567 | – |" in card
    assert "epochs 7" in card and "## Licence\n\nTo be filled in" in card
    assert "ann/teacher" not in card and "/home" not in card
    assert r"cat, dog\|\<b\>, emu" in card
    about = huggingface_hub.ModelCard(card).data
    assert about.license is None and about.library_name == "timm"
    assert about.pipeline_tag == "image-classification"
    assert {"attention-transfer", "knowledge-distillation"} <= set(about.tags)


def test_a_run_without_a_summary(command, student_run, tmp_path):
    """As one of the authors' scripts: the card leaves out what nobody knows."""
    from authors_files import write_run, wrn_params

    write_run(tmp_path / "theirs", wrn_params(10, 1))
    assert command("push theirs ann/small --dry-run").status == 0
    card = (tmp_path / "small" / "README.md").read_text()
    assert "| error |" not in card and "are not recorded" in card
    assert command(f"push {student_run} ann/other --dry-run").status == 0
    card = (tmp_path / "other" / "README.md").read_text()
    error = 1 - json.loads((student_run / "summary.json").read_text())["final"]["val_accuracy"]
    assert f"| error | {100 * error:.2f} % |" in card and "trained on digits" in card


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("folder:/home/ann/photos", "folder:photos"),
        ("cifar10:/data/cifar", "cifar10:cifar"),
        ("/home/ann/net.py:make", "net.py:make"),
        ("hub:ann/photos", "hub:ann/photos"),
        ("timm/resnet18:pretrained", "timm/resnet18:pretrained"),
        ("digits", "digits"),
    ],
)
def test_no_folder_of_this_machine_is_published(name, public):
    assert public_name(name) == public


class FakeHub:
    """The calls of the hub, kept."""

    calls: list = []
    files: set = set()

    def __init__(self, **about):
        pass

    def create_repo(self, repo, private, exist_ok):
        self.calls.append(("create", repo, private, exist_ok))

    def file_exists(self, repo, file):
        return file in self.files

    def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns):
        names = {file.name for file in Path(folder_path).iterdir()}
        self.calls.append(("upload", repo_id, names, ignore_patterns))


class TestUpload:
    @pytest.fixture
    def hub(self, monkeypatch):
        class Hub(FakeHub):
            calls = []
            files = set()

        monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
        return Hub

    def test_a_new_repository(self, command, hub, student_run):
        answer = command(f"push {student_run} ann/small --private")
        assert (answer.status, answer.err) == (0, "")
        assert hub.calls == [
            ("create", "ann/small", True, True),
            ("upload", "ann/small", {"README.md", "model.pt2", "model.safetensors"}, None),
        ]
        assert "is at https://huggingface.co/ann/small" in answer.out
        assert "next: fill in the licence" in answer.out

    def test_a_card_that_a_person_may_have_edited_stays(self, command, hub, student_run):
        hub.files = {"README.md"}
        assert "--force replaces it" in command(f"push {student_run} ann/small").out
        assert hub.calls[-1][3] == ["README.md"]
        command(f"push {student_run} ann/small --force")
        assert hub.calls[-1][3] is None

    def test_a_failure_is_one_line(self, command, hub, student_run, monkeypatch):
        def fail(*args, **options):
            raise huggingface_hub.errors.LocalTokenNotFoundError("no token\nat all")

        monkeypatch.setattr(hub, "create_repo", fail)
        answer = command(f"push {student_run} ann/small")
        assert answer.status == 1 and answer.err.count("\n") == 1
        assert "ann/small could not be uploaded" in answer.err and "hf auth login" in answer.err

    @pytest.mark.parametrize("repo", ["small", "a/b/c", "ann/", "ann/sm all", "../x"])
    def test_names_that_the_hub_does_not_allow(self, command, hub, student_run, repo):
        answer = command(f"push {student_run} '{repo}' --dry-run --out new")
        assert answer.status == 2 and answer.err.count("\n") == 1
        assert hub.calls == [] and not Path("new").exists()


@pytest.mark.parametrize("name", ["timm/resnet10t", "torchvision/squeezenet1_1", "wrn-16-1"])
def test_the_page_shows_the_code_of_the_card(name):
    preprocess = Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (224, 224))
    network = Network(torch.nn.Identity(), name, tuple("0123456789"), preprocess)
    blocks = re.findall(r"```py\n(.*?)```", (DOCS / "deploy.md").read_text(), re.DOTALL)
    assert loading_code(network, "ann/small") in blocks
