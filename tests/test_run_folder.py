"""The run folder: what is written whole or not at all, and what is read of a damaged one."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from attention_transfer import load_student
from attention_transfer.errors import RunError, UserError, check_choice, nearest
from attention_transfer.models.network import read_metadata
from attention_transfer.report import read_run
from attention_transfer.run_folder import RunFolder, find_runs, replacing, write_json


def test_a_crash_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"x": 1})
    with pytest.raises(TypeError):
        write_json(file, {"x": object()})
    with pytest.raises(KeyboardInterrupt), replacing(file) as partial:  # noqa: PT012
        partial.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == '{\n "x": 1\n}\n'
    assert list(tmp_path.iterdir()) == [file]


def test_reading_what_is_not_there(tmp_path):
    run = RunFolder(tmp_path)
    assert (run.exists, run.finished) == (False, False)
    assert (run.config(), run.environment(), run.summary(), run.metrics()) == ({}, {}, None, [])


def test_config_and_metrics_come_back(tmp_path):
    run = RunFolder(tmp_path / "deep" / "run")
    run.write_config({"model": "wrn-10-1", "lr": 5e-4, "milestones": [1, 2]})
    run.write_metrics([{"epoch": 1}, {"epoch": 2}])
    assert RunFolder.open(run.path).config() == {
        "model": "wrn-10-1",
        "lr": 5e-4,
        "milestones": [1, 2],
    }
    assert run.metrics() == [{"epoch": 1}, {"epoch": 2}]
    with run.metrics_file.open("a") as file:
        file.write('{"epoch": 3, "tra')
    assert run.metrics() == [{"epoch": 1}, {"epoch": 2}]


@pytest.mark.parametrize("text", ["a: [", "- a", "\x00"])
def test_a_damaged_config(tmp_path, text):
    run = RunFolder(tmp_path)
    run.config_file.write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml"):
        run.config()


def test_a_damaged_summary(tmp_path):
    run = RunFolder(tmp_path)
    run.summary_file.write_text("{")
    with pytest.raises(UserError, match=r"summary\.json is not JSON"):
        run.summary()


def test_finding_runs(tmp_path):
    for name in ("b/seed-0", "b/seed-1", "a"):
        RunFolder(tmp_path / name).write_config({})
    found = find_runs([tmp_path / "b", tmp_path / "a", tmp_path / "b" / "seed-0"])
    assert [str(r.path.relative_to(tmp_path)) for r in found] == ["b/seed-0", "b/seed-1", "a"]
    with pytest.raises(UserError, match="no run in"):
        find_runs([tmp_path / "none"])
    with pytest.raises(UserError, match="is not a run folder"):
        RunFolder.open(tmp_path)
    with pytest.raises(UserError, match="b holds several seeds: name one, like .*b/seed-0$"):
        RunFolder.open(tmp_path / "b")


def test_errors_and_the_nearest_word():
    assert issubclass(UserError, ValueError)
    assert issubclass(RunError, RuntimeError)
    assert nearest("wrn-16-l", ["wrn-16-1", "nin"]) == "; did you mean wrn-16-1?"
    assert nearest("zzz", ["wrn-16-1"]) == ""
    check_choice("kind", "sum", ("sum", "max"))
    with pytest.raises(
        UserError, match="unknown kind 'sun': expected one of sum, max; did you mean sum"
    ):
        check_choice("kind", "sun", ("sum", "max"))


def damaged(student_run, tmp_path, name, *keys, value):
    """A copy of a run with `value` at `keys` of the JSON in one of its files."""
    run = RunFolder(tmp_path / "run")
    shutil.copytree(student_run, run.path)
    file = run.path / name
    lines = file.read_text().splitlines() if name.endswith("jsonl") else [file.read_text()]
    content = place = json.loads(lines[0])
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    file.write_text("\n".join([json.dumps(content), *lines[1:]]))
    return run


@pytest.mark.parametrize(
    ("name", "keys", "value", "message"),
    [
        ("summary.json", ["final", "val_loss"], "low", "final.val_loss is 'low', expected a valid"),
        ("summary.json", ["final"], [], "final is [], expected a valid dictionary"),
        ("summary.json", ["classes"], 7, "classes is 7, expected a valid list"),
        ("summary.json", ["teacher", "name"], 7, "teacher.name is 7, expected a valid string"),
        ("summary.json", ["attention", "in_box", 0], "x", "attention.in_box.0 is 'x', expected"),
        ("summary.json", ["seconds"], True, "seconds is True, expected a valid number"),
        ("environment.json", ["auto"], "bf16", "auto is 'bf16', expected"),
        ("environment.json", ["auto", "precision"], "fp8", "auto.precision is 'fp8', expected 'fp"),
        ("environment.json", ["auto", "threads"], 0, "auto.threads is 0, expected greater than or"),
        ("metrics.jsonl", ["epoch"], 1.5, "line 1, is damaged: epoch is 1.5, expected a valid int"),
        ("metrics.jsonl", ["parts"], 7, "line 1, is damaged: parts is 7, expected a valid dict"),
    ],
)
def test_a_value_of_another_type_is_named(student_run, tmp_path, name, keys, value, message):
    run = damaged(student_run, tmp_path, name, *keys, value=value)
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        read_run(run)
    assert str(run.path / name) in str(raised.value)


@pytest.mark.parametrize("text", ["[]", "7", "null", '"text"'])
def test_a_summary_that_is_no_object(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(UserError, match=r"summary\.json is damaged: it is .*expected"):
        RunFolder(tmp_path).summary()


def test_a_config_of_another_type_is_named(tmp_path):
    run = RunFolder(tmp_path)
    run.write_config({"model": ["wrn-10-1"]})
    with pytest.raises(UserError, match=r"config\.yaml is damaged: model is \['wrn-10-1'\], expec"):
        run.config()


def test_unknown_and_missing_keys_are_left_alone(tmp_path):
    run = RunFolder(tmp_path)
    for content in ({}, {"new": {"x": [1]}}, {"teacher": None}):
        write_json(run.summary_file, content)
        assert run.summary() == content
        write_json(run.environment_file, content)
        assert run.environment() == content


def test_a_line_in_the_middle_of_the_metrics(tmp_path):
    run = RunFolder(tmp_path)
    run.metrics_file.write_text('{"epoch": 1}\n{"epo\n{"epoch": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2, is not JSON"):
        run.metrics()


def test_deep_json(tmp_path):
    (tmp_path / "summary.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"summary\.json is not JSON"):
        RunFolder(tmp_path).summary()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", 7),
        ("model", ""),
        ("classes", []),
        ("classes", "abc"),
        ("mean", [0.5]),
        ("std", [1.0, 0.0, 1.0]),
        ("image_size", [0, 32]),
        ("image_size", [10**9, 32]),
    ],
)
def test_metadata_of_another_type_are_named(student_run, tmp_path, key, value):
    run = tmp_path / "run"
    shutil.copytree(student_run, run)
    file = run / "student.safetensors"
    about = read_metadata(file)
    save_file(load_file(file), file, {"attention_transfer": json.dumps(about | {key: value})})
    with pytest.raises(UserError, match=rf"student\.safetensors, its metadata, is damaged: {key}"):
        load_student(run)
