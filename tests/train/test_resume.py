"""Which recipe continues the run in a folder."""

from __future__ import annotations

import shutil

import pytest
from small_runs import distilled, small

from attention_transfer.errors import UserError
from attention_transfer.run_folder import RunFolder, write_json
from attention_transfer.train.resume import check_folder, describe_processes, teacher_fingerprint
from attention_transfer.train.run import run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Writes a run's config.yaml into the folder `run`, in the test's own folder."""
    monkeypatch.chdir(tmp_path)

    def write(recipe):
        RunFolder("run").write_config(recipe.to_dict())
        return RunFolder("run")

    return write


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ({"teacher": "teacher"}, {"teacher": "./teacher"}),
        ({"teacher": "teacher"}, {"teacher": "../{here}/teacher/"}),
        ({"data": "folder:cats"}, {"data": "folder:./cats"}),
        ({"model": "net.py:make"}, {"model": "./net.py:make"}),
        ({"student_weights": "a.pt"}, {"student_weights": "x/../a.pt"}),
    ],
)
def test_another_spelling_is_the_same(folder, tmp_path, there, here):
    here = {key: value.format(here=tmp_path.name) for key, value in here.items()}
    there, here = {"teacher": "t"} | there, {"teacher": "t"} | here
    run_folder = folder(distilled(there.pop("teacher"), **there))
    check_folder(run_folder, distilled(here.pop("teacher"), **here))


@pytest.mark.parametrize(
    "other",
    [{"data": "folder:dogs"}, {"model": "wrn-16-1"}, {"model": "net.py:other"}, {"method": "at"}],
)
def test_another_value_is_another_run(folder, other):
    run_folder = folder(distilled("t", model="net.py:make", data="folder:cats"))
    recipe = distilled("t", **{"model": "net.py:make", "data": "folder:cats"} | other)
    with pytest.raises(UserError, match="holds a different run"):
        check_folder(run_folder, recipe)


def test_a_null_number_of_processes_is_one(folder):
    run_folder = folder(small())
    run_folder.config_file.write_text("devices: null")
    assert describe_processes(run_folder, small()) is None


def test_a_teacher_that_was_moved_is_the_same(folder, teacher_run, tmp_path):
    run_folder = folder(distilled("gone"))
    write_json(run_folder.environment_file, {"teacher": teacher_fingerprint(str(teacher_run))})
    check_folder(run_folder, distilled(str(teacher_run)))
    write_json(run_folder.environment_file, {"teacher": "other weights"})
    with pytest.raises(UserError, match="teacher is 'gone' in that run"):
        check_folder(run_folder, distilled(str(teacher_run)))


def test_a_config_that_a_person_wrote_is_kept(folder):
    run_folder = folder(small())
    check_folder(run_folder, small())  # as after a kill before the second file was written
    run_folder.write_config({"command": "train", "model": "wrn-10-1"})
    with pytest.raises(UserError, match="run has a config.yaml, but no run wrote it"):
        check_folder(run_folder, small())
    run_folder.student_file.write_bytes(b"somebody's")
    with pytest.raises(UserError, match="run has a config.yaml, but no run wrote it"):
        check_folder(run_folder, small())


def test_a_pretraining_run_that_was_moved_is_the_same(folder, tmp_path):
    before, after = (tmp_path / place / "wrn-10-1" / "none-1" / "seed-0" for place in "ab")
    for path in (before, after):
        RunFolder(path).write_config(small().to_dict())
    run_folder = folder(small(student_weights=str(before)))
    write_json(run_folder.environment_file, {})
    with pytest.raises(UserError, match="student_weights is"):
        check_folder(run_folder, small(student_weights=str(after)))
    shutil.rmtree(before)
    check_folder(run_folder, small(student_weights=str(after)))


def test_the_terms_keep_the_order_of_the_run(folder):
    """Their sum is rounded in that order."""
    run_folder = folder(distilled("t", method="kd+at"))
    assert check_folder(run_folder, distilled("t", method="at + kd")).method == "kd+at"


def test_a_record_without_what_auto_decided(folder):
    run_folder = folder(small())
    write_json(run_folder.environment_file, {"auto": None})
    check_folder(run_folder, small())


def test_a_summary_that_lacks_a_number(teacher_run, tmp_path):
    from rich.console import Console

    shutil.copytree(teacher_run, tmp_path / "run")
    write_json(tmp_path / "run" / "summary.json", {"final": {"val_accuracy": 0.5}})
    with pytest.raises(UserError, match=r"summary\.json is damaged: it lacks val_loss; delete it"):
        run(small(), tmp_path / "run", Console(quiet=True))
