"""The run folder: what is written whole or not at all, and what is read of a damaged one."""

from __future__ import annotations

import pytest

from attention_transfer.errors import RunError, UserError, check_choice, nearest
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
