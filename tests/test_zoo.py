"""Trained networks of the package, with a stand-in that is built here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from small_runs import FLAGS, Command, contents

import attention_transfer as at
from attention_transfer.errors import UserError
from attention_transfer.models.start import load_network, start_network
from attention_transfer.run_folder import RunFolder, zoo_names

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import add_to_zoo

DIGITS = tuple(str(i) for i in range(10))


@pytest.fixture
def zoo(teacher_run: Path, tmp_path: Path, monkeypatch, quick_runs) -> Path:
    """A zoo with the network of a small run, `zoo:tiny`."""
    folder = tmp_path / "zoo"
    monkeypatch.setattr("attention_transfer.run_folder.ZOO_FOLDER", folder)
    add_to_zoo.add(teacher_run, "tiny", half=False, data=None, about="A stand-in.")
    return folder


def test_an_entry_is_a_run_with_a_card_and_no_places_of_this_machine(zoo, teacher_run):
    assert zoo_names() == ["zoo:tiny"]
    with pytest.raises(at.UserError, match="the package has no model 'zoo:': expected one of zoo"):
        at.create_model("zoo:", 10)
    files = contents(zoo / "tiny")
    assert files.keys() == {
        "README.md", "config.yaml", "environment.json", "student.safetensors", "summary.json",
    }  # fmt: skip
    for name, content in files.items():
        if name != "student.safetensors":
            assert str(teacher_run.parent).encode() not in content, name
    card = files["README.md"].decode()
    summary = json.loads(files["summary.json"])
    assert summary["sha256"] in card
    assert f"{100 * (1 - summary['stored_accuracy']):.2f} %" in card


def test_a_network_of_the_zoo_is_the_runs_network(zoo, teacher_run):
    x = torch.rand(2, 3, 32, 32)
    expected = at.load_student(teacher_run)(x)
    assert torch.equal(at.load_student("zoo:tiny")(x), expected)
    network = load_network("zoo:tiny", DIGITS, (0.5,) * 3, (0.5,) * 3)
    assert torch.equal(network.module(network.preprocess(x)), expected)
    assert network.fingerprint == RunFolder("zoo:tiny").summary()["sha256"]


def test_create_model_makes_a_new_head_for_other_classes(zoo):
    same, other = at.create_model("zoo:tiny", 10), at.create_model("zoo:tiny", 7)
    assert torch.equal(same.conv0.weight, other.conv0.weight)
    assert other(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_a_student_starts_from_it(zoo):
    network, notes = start_network("zoo:tiny", DIGITS, (0.5,) * 3, (0.5,) * 3)
    trained = load_network("zoo:tiny", DIGITS, (0.5,) * 3, (0.5,) * 3)
    assert torch.equal(network.module.fc.weight, trained.module.fc.weight)
    assert torch.equal(network.preprocess.mean, trained.preprocess.mean)
    assert any("zoo:tiny" in note for note in notes)
    other, notes = start_network("zoo:tiny", tuple("abcdefghij"), (0.5,) * 3, (0.5,) * 3)
    assert not torch.equal(other.module.fc.weight, trained.module.fc.weight)
    assert any("other classes" in note for note in notes)


def test_the_commands_take_it(zoo, command: Command, tmp_path):
    said = command("zoo")
    assert said.status == 0
    assert "zoo:tiny" in said.out and "wrn-10-1" in said.out and "digits" in said.out
    line = f"distill --teacher zoo:tiny --student wrn-10-1 --method kd {FLAGS} --epochs 1"
    assert command(f"{line} --out a").status == 0
    assert command(f"{line} --out a").out.count("is finished") == 1
    assert command(f"train --model zoo:tiny {FLAGS} --epochs 1 --out b --lr 0.01").status == 0
    said = command("evaluate zoo:tiny --device cpu --limit-val 100")
    assert said.status == 0, said.err
    assert command("evaluate b --device cpu").status == 0
    said = command("compare a zoo:tiny")
    assert said.status == 0, said.err


def test_an_unknown_name_has_the_nearest(zoo, command: Command):
    for line in ("evaluate zoo:tinny", "train --model zoo:tinny --out x", "stages zoo:tinny"):
        said = command(line)
        assert said.status == 2
        assert "did you mean zoo:tiny?" in said.err


def test_damaged_weights_are_refused(zoo):
    file = zoo / "tiny" / "student.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="student.safetensors was damaged or replaced"):
        at.load_student("zoo:tiny")


def test_weights_in_half_precision_are_near(zoo, teacher_run):
    add_to_zoo.add(teacher_run, "half", half=True, data=None, about="")
    x = torch.rand(2, 3, 32, 32)
    half = at.load_student("zoo:half")
    assert half.network.fc.weight.dtype == torch.float32
    torch.testing.assert_close(half(x), at.load_student(teacher_run)(x), atol=0.05, rtol=0.05)
    sizes = [(zoo / name / "student.safetensors").stat().st_size for name in ("half", "tiny")]
    assert sizes[0] < 0.7 * sizes[1]


@pytest.mark.parametrize(
    ("name", "words"), [("tiny", "exists"), ("A b", "expected lower-case letters")]
)
def test_names_that_cannot_be(zoo, teacher_run, name, words):
    with pytest.raises(UserError, match=words):
        add_to_zoo.add(teacher_run, name, half=False, data=None, about="")


def test_large_weights_are_refused_and_leave_nothing(zoo, teacher_run, monkeypatch):
    monkeypatch.setattr(add_to_zoo, "LARGEST", 1000)
    with pytest.raises(UserError, match="expected at most"):
        add_to_zoo.add(teacher_run, "big", half=False, data=None, about="")
    assert not (zoo / "big").exists()


@pytest.mark.parametrize("name", zoo_names())
def test_the_packages_own_entries_are_whole(name):
    folder = RunFolder(name)
    at.load_student(name)
    assert folder.student_file.stat().st_size <= add_to_zoo.LARGEST
    assert (folder.summary() or {})["sha256"] in (folder.path / "README.md").read_text()
