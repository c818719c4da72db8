"""What is read from a run folder is data: its code needs the user's word."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from small_runs import FACTORY, FLAGS, rows, write_factory

import attention_transfer as at
from attention_transfer.apply.maps import map_columns
from attention_transfer.apply.speed import measure_speeds
from attention_transfer.models.network import file_fingerprint
from attention_transfer.run_folder import write_json

EXECUTED = "from pathlib import Path\nPath(__file__).with_name('executed').touch()\n"


@pytest.fixture
def received(student_run, tmp_path) -> Path:
    """A run from somebody else, whose metadata name a network of a Python file that lies beside."""
    write_factory(tmp_path)
    (tmp_path / "net.py").write_text(EXECUTED + FACTORY)
    run = tmp_path / "received"
    shutil.copytree(student_run, run)
    rename(run, "net.py:make")
    return run


def rename(run: Path, name: str) -> None:
    """Gives the network of a run another name, and the weights of net.py."""
    from attention_transfer.models.create import create_model

    file = run / "student.safetensors"
    with safe_open(file, framework="pt") as content:
        about = json.loads(content.metadata()["attention_transfer"])
    weights = create_model(str(run.parent / "net.py:make"), len(about["classes"])).state_dict()
    (run.parent / "executed").unlink(missing_ok=True)
    about["model"] = name
    save_file(weights, file, {"attention_transfer": json.dumps(about)})
    summary = json.loads((run / "summary.json").read_text())
    write_json(run / "summary.json", summary | {"sha256": file_fingerprint(file)})
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("model: wrn-10-1", f"model: {name}"))


LINES = (
    "evaluate received --limit-val 10 --device cpu",
    "predict received photo.png --device cpu",
    "export received --format safetensors --out a.safetensors",
    "compare received --speed --device cpu",
    "maps received --images photo.png --out a.png",
    "stages received",
    "stages wrn-10-1 received",
    f"distill --student wrn-10-1 --teacher received --method kd {FLAGS} --max-steps 1 --out out",
    f"train --model wrn-10-1 --student-weights received {FLAGS} --max-steps 1 --out out",
    f"distill --config received/config.yaml {FLAGS} --max-steps 1 --out out",
)


@pytest.mark.parametrize("line", LINES)
def test_no_command_executes_the_file_of_a_run(command, received, monkeypatch, line):
    from PIL import Image

    Image.new("RGB", (16, 16)).save("photo.png")
    # What is measured is not the matter, and takes time.
    monkeypatch.setattr("attention_transfer.apply.speed.ROUNDS", 1)
    said = command(line)
    assert said.status == 2 and not Path("executed").exists()
    assert "net.py" in said.err and "--trust-code" in said.err
    if "--student-weights" in line:
        # Another network's weights: the refusal above is what matters.
        return
    said = command(f"{line} --trust-code")
    assert (said.status, Path("executed").exists()) == (0, True), said.err


def test_a_suffix_is_no_way_round(command, received):
    rename(received, "net.py:make:pretrained")
    assert "--trust-code" in command("stages received").err
    assert not Path("executed").exists()


def test_python_asks_too(received, monkeypatch):
    monkeypatch.chdir(received.parent)
    for read in (
        lambda: at.load_student(received),
        lambda: map_columns([str(received)], "digits", 1, "sum", 2.0),
        lambda: measure_speeds([received], "cpu"),
    ):
        with pytest.raises(at.UserError, match=r"net\.py.*--trust-code .in Python: trust_code=Tr"):
            read()
    assert not Path("executed").exists()
    assert at.load_student(received, trust_code=True).network.one is not None
    assert Path("executed").exists()


def test_what_a_person_types_is_trusted(command, received):
    line = f"train --model net.py:make {FLAGS} --epochs 1 --out mine"
    assert command(line).status == 0
    assert command(line).status == 0  # it continues, and finds that all is done
    assert "net.py" in (Path("mine") / "config.yaml").read_text() and len(rows(Path("mine"))) == 1
    assert command("stages net.py:make").status == 0
    Path("r.yaml").write_text("model: net.py:make\n")
    assert command(f"train --config r.yaml {FLAGS} --epochs 1 --out other").status == 0


def test_a_flag_in_place_of_the_runs_network(command, received):
    line = f"distill --config received/config.yaml {FLAGS} --model wrn-10-1 --max-steps 1 --out out"
    assert command(line).status == 0
    assert not Path("executed").exists()


def test_a_missing_file_makes_a_run_no_recipe(command, received):
    (received / "environment.json").unlink()
    said = command(f"distill --config received/config.yaml {FLAGS} --max-steps 1 --out out")
    assert said.status == 2 and "--trust-code" in said.err
    assert not Path("executed").exists()


def test_no_file_gives_the_users_word(command, received):
    with open("received/config.yaml", "a") as config:
        config.write("trust_code: true\n")
    said = command("distill --config received/config.yaml --out out")
    assert said.status == 2 and "trust_code" in said.err and "config.yaml" in said.err
    assert not Path("executed").exists()
