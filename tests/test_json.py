"""`--json FILE`: what a command prints in numbers, for programs."""

from __future__ import annotations

import json

import pytest

from attention_transfer.commands import COMMANDS

# They print no numbers, or serve, draw or upload.
WITHOUT = {"maps", "view", "push", "completion"}


def test_every_command_that_prints_numbers_has_it():
    having = set()
    for name, command in COMMANDS.items():
        keys = {spec.key for group in command.groups().values() for spec in group}
        if "json" in keys:
            assert "force" in keys
            having.add(name)
    assert having == COMMANDS.keys() - WITHOUT


@pytest.fixture
def numbers(command, tmp_path):
    """The numbers that a command writes."""

    def run(words: str) -> dict:
        file = tmp_path / "numbers.json"
        said = command(f"{words} --json {file}")
        assert said.status == 0, said.err
        return json.loads(file.read_text())

    return run


def test_train(numbers, tmp_path):
    small = "--data digits --limit-train 40 --limit-val 20 --epochs 1 --batch-size 20"
    found = numbers(f"train --model wrn-10-1 {small} --seeds 2 --out {tmp_path / 'runs'}")
    assert [run["seed"] for run in found["runs"]] == [0, 1]
    for run in found["runs"]:
        summary = json.loads((tmp_path / "runs" / f"seed-{run['seed']}/summary.json").read_text())
        assert run == {"folder": str(tmp_path / "runs" / f"seed-{run['seed']}")} | summary


def test_compare(numbers, student_run, teacher_run):
    found = numbers(f"compare {student_run} {teacher_run}")
    teacher, student = found["rows"]
    assert (teacher["role"], student["role"]) == ("teacher", "student")
    accuracy = json.loads((student_run / "summary.json").read_text())["final"]["val_accuracy"]
    assert student["error"]["values"] == [100 * (1 - accuracy)]
    assert student["error"]["sd"] is None
    assert student["teacher"] == teacher["network"]
    assert student["runs"] == [{"folder": str(student_run), "seed": 0, "finished": True}]
    assert found["sentences"]


def test_stages(numbers):
    found = numbers("stages wrn-10-1 wrn-16-1")
    student = found["networks"][0]
    assert student["name"] == "wrn-10-1" and student["image_size"] == [32, 32]
    assert [stage["size"] for stage in student["stages"]][-3:] == [[32, 32], [16, 16], [8, 8]]
    assert {pair["student"] for pair in found["pairs"]} >= {"group0", "group1", "group2"}
    assert {layer["side"] for layer in found["unpaired"]} <= {"student", "teacher"}
    assert "pairs" not in numbers("stages wrn-10-1")


def test_stages_beside_a_run_of_the_authors(numbers, tmp_path):
    """The run has its own size, so the other network keeps that of small images."""
    from authors_files import write_run, wrn_params

    write_run(tmp_path / "theirs", wrn_params(10, 1))
    found = numbers(f"stages wrn-16-1 {tmp_path / 'theirs'}")
    assert [network["image_size"] for network in found["networks"]] == [[32, 32], [32, 32]]


def test_zoo(numbers):
    assert isinstance(numbers("zoo")["networks"], list)


def test_teach(numbers, teacher_run, tmp_path):
    words = f"teach --teacher {teacher_run} --data digits --views 1 --out {tmp_path / 'store'}"
    found = numbers(f"{words} --dry-run")
    assert not (tmp_path / "store").exists()
    assert found["views"] == 1 and found["bytes"] > 0
    assert sum(found["arrays"]["logits"]) > 0


def test_a_plan(numbers, tmp_path):
    words = "reproduce table1 --rows wrn-16-2:wrn-16-1 --seeds 1 --epochs 1 --limit-train 64"
    found = numbers(
        f"{words} --data digits --batch-size 32 --out {tmp_path / 'evidence'} --dry-run"
    )
    assert found["runs"] == sum(kind["runs"] for kind in found["kinds"])
    assert found["finished"] == found["to_continue"] == 0
    assert found["seconds"] > 0 and found["bytes"] > 0


def test_it_does_not_replace_a_file_of_a_run(command, student_run):
    said = command(f"compare {student_run} --json {student_run / 'summary.json'}")
    assert said.status == 2 and "summary.json is the run's own" in said.err
