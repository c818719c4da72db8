"""`reproduce` from end to end, with runs of a few steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from small_runs import Command, contents, stop_after, write_factory

from attention_transfer import cli
from attention_transfer.run_lock import RunLock

TABLE = {
    "title": "Tiny table",
    "source": "nobody",
    "options": {"data": "digits", "limit_val": 100, "batch_size": 32, "flip": False},
    "settings": {
        "student alone": {"method": "none"},
        "KD": {"method": "kd"},
    },
    "rows": [
        {
            "student": "wrn-10-1",
            "teacher": "wrn-10-2",
            "published": {"student alone": 50.0, "KD": 40.0},
            "confirmed": ["KD"],
        }
    ],
}
LINE = "reproduce mine.yaml --out out --limit-train 64 --epochs 1 --device cpu --compile off"


class Killed(BaseException):
    """As if the process had been killed: nothing is saved."""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(TABLE, sort_keys=False))
    return file


def finished(folder: Path) -> set[Path]:
    return {file.parent for file in folder.rglob("summary.json")}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A folder with the table and its finished runs."""
    folder = tmp_path_factory.mktemp("done")
    (folder / "mine.yaml").write_text(yaml.safe_dump(TABLE, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli.main(f"{LINE} --seeds 2".split())
    return folder


@pytest.fixture
def again(done: Path, tmp_path: Path) -> Path:
    """A copy of the folder at another place."""
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    return tmp_path


def runs(folder: Path) -> list[Path]:
    """The runs of the method kd, by seed."""
    return sorted(folder.glob("out/runs/wrn-10-1/kd-*/seed-*"))


def test_a_moved_folder_goes_on(command: Command, again: Path):
    unfinished = runs(again)[1]
    for name in ("summary.json", "report.html"):
        (unfinished / name).unlink()
    said = command(f"{LINE} --seeds 2")
    assert said.status == 0, said.err
    assert "4 finished, 1 to continue, 0 to do" in said.out


def test_a_run_that_was_copied_from_another_is_refused(command: Command, again: Path):
    first, second = runs(again)
    shutil.copy(first / "summary.json", second)
    said = command(f"{LINE} --seeds 2")
    assert said.status == 2 and f"{second}/student.safetensors was damaged" in said.err
    shutil.rmtree(second)
    shutil.copytree(first, second)
    said = command(f"{LINE} --seeds 2")
    assert said.status == 2 and "seed is 0 in that run, 1 in this command" in said.err


def test_the_weights_of_finished_runs_may_be_deleted(command: Command, again: Path):
    for file in again.glob("out/runs/wrn-10-1/*/*/student.safetensors"):
        file.unlink()
    said = command(f"{LINE} --seeds 2")
    assert said.status == 0 and "5 finished" in said.out


def test_finished_runs_may_differ_in_how_they_ran(command: Command, again: Path):
    said = command(f"{LINE} --seeds 2 --stream on --precision bf16 --dry-run")
    assert said.status == 0 and "5 finished" in said.out


def test_a_summary_alone_is_no_run(command: Command, again: Path):
    first, second = runs(again)
    shutil.rmtree(second)
    second.mkdir()
    shutil.copy(first / "summary.json", second)
    said = command(f"{LINE} --seeds 2")
    assert said.status == 2 and f"{second} has a summary.json and no config.yaml" in said.err


def test_a_summary_without_a_number_of_the_table_is_named(command: Command, again: Path):
    file = runs(again)[1] / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"flops": None}))
    said = command(f"{LINE} --seeds 2")
    assert said.status == 2 and f"{file} is damaged: it lacks flops" in said.err


def test_a_damaged_unfinished_run_stops_no_other(command: Command, again: Path):
    unfinished = runs(again)[1]
    (unfinished / "summary.json").unlink()
    (unfinished / "config.yaml").write_text("")
    shutil.rmtree(runs(again)[0])
    said = command(f"{LINE} --seeds 2")
    assert said.status == 1 and "KD" in said.out
    assert (runs(again)[0] / "summary.json").exists()


def test_images_that_changed_between_runs_are_noted(command: Command, again: Path):
    file = runs(again)[0] / "environment.json"
    environment = json.loads(file.read_text())
    environment["data"]["fingerprint"] = "other"
    file.write_text(json.dumps(environment))
    assert "The images changed between runs" in command(f"{LINE} --seeds 2").out


@pytest.mark.parametrize("suffix", [".jsonl", ".md", ".txt"])
def test_somebodys_file_is_no_table(command: Command, again: Path, suffix):
    for file in again.glob("out/mine-*"):
        file.unlink()
    mine = again / "out" / f"mine-seeds=2-epochs=1-limit_train=64{suffix}"
    mine.write_text('{"title": "mine"}')
    said = command(f"{LINE} --seeds 2")
    assert said.status == 2 and f"{mine.name} exists, and is no table of this tool" in said.err
    assert mine.read_text() == '{"title": "mine"}'
    assert command(f"{LINE} --seeds 2 --force").status == 0
    assert mine.read_text() != '{"title": "mine"}'


@pytest.mark.usefixtures("table")
def test_the_whole_table_and_again(command: Command, tmp_path, monkeypatch):
    seen = []

    def kill(trainer):
        seen.append(trainer)
        # Three kinds of run are measured first; the first run is the teacher.
        if len(seen) == 5:
            raise Killed

    with monkeypatch.context() as patch:
        stop_after(patch, 1, kill)
        with pytest.raises(Killed):
            command(f"{LINE} --seeds 2")
    before = finished(tmp_path / "out")
    assert [folder.parts[-3] for folder in before] == ["wrn-10-2"]
    files = {folder: contents(folder) for folder in before}

    said = command(f"{LINE} --seeds 2")
    assert (said.status, said.err) == (0, "")
    assert f"5 runs in {tmp_path / 'out'}; {len(before)} finished" in said.out
    assert {folder: contents(folder) for folder in before} == files
    assert len(finished(tmp_path / "out")) == 5
    stem = "mine-seeds=2-epochs=1-limit_train=64"
    page = (tmp_path / "out" / f"{stem}.md").read_text()
    assert "Tiny table (with seeds 2, epochs 1, limit-train 64)" in page
    assert "50†" in page and "| 40 |" in page
    lines = [json.loads(x) for x in (tmp_path / "out" / f"{stem}.jsonl").read_text().splitlines()]
    assert lines[0]["title"] in page
    runs = [line for line in lines if "seed" in line]
    assert [(line["setting"], line["seed"]) for line in runs] == [
        ("student alone", 0), ("student alone", 1), ("KD", 0), ("KD", 1), ("teacher", 0),
    ]  # fmt: skip
    assert str(tmp_path) not in json.dumps(lines)
    assert "Tiny table" in (tmp_path / "out" / f"{stem}.txt").read_text()

    said = command(f"{LINE} --seeds 2")
    assert "5 finished, 0 to continue, 0 to do" in said.out


@pytest.mark.usefixtures("table")
def test_a_second_command_in_the_folder_is_refused(command: Command, tmp_path):
    with RunLock(tmp_path / "out"):
        said = command(f"{LINE} --dry-run --seeds 1")
    assert said.status == 2
    assert f"{tmp_path / 'out'} is being written by process" in said.err


@pytest.mark.usefixtures("table")
def test_a_dry_run_starts_nothing(command: Command, tmp_path):
    said = command(f"{LINE} --dry-run --seeds 1")
    assert said.status == 0
    assert "3 runs in" in said.out and "0 finished" in said.out
    assert "MB of disk" in said.out
    assert not finished(tmp_path)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["measured.json"]


@pytest.mark.usefixtures("table")
def test_the_title_and_the_files_say_what_is_different(command: Command, tmp_path, monkeypatch):
    monkeypatch.setattr("attention_transfer.studies.reproduce.carry_out_plan", lambda *_: True)
    runs = "--seeds 1 --rows wrn-10-2:wrn-10-1 --data cifar10:nowhere"
    assert command(f"reproduce mine.yaml --out out {runs}").status == 0
    (page,) = (tmp_path / "out").glob("*.md")
    assert page.stem == "mine-rows=wrn-10-2-wrn-10-1-seeds=1-data=cifar10"
    assert "(with rows wrn-10-2:wrn-10-1, seeds 1, data cifar10)" in page.read_text()
    assert command("reproduce mine.yaml --out whole --data digits").status == 0
    assert (tmp_path / "whole" / "mine.md").exists()


def test_an_unknown_error_of_a_run_is_named_and_the_others_go_on(
    command: Command, tmp_path, table, monkeypatch
):
    from attention_transfer import launch

    run = launch.run_and_report

    def fail_once(recipe, folder, console, jobs):
        if recipe.method == "kd":
            raise ValueError("no kernel image")
        run(recipe, folder, console, jobs)

    monkeypatch.setattr(launch, "run_and_report", fail_once)
    said = command(f"{LINE} --seeds 1")
    assert said.status == 1
    assert "ValueError: no kernel image" in said.err
    assert len(finished(tmp_path / "out")) == 2


def test_a_failed_run_is_named_and_the_others_go_on(command: Command, tmp_path, table):
    values = TABLE | {"settings": TABLE["settings"] | {"worse": {"method": "none", "lr": 1e30}}}
    table.write_text(yaml.safe_dump(values, sort_keys=False))
    said = command(f"{LINE} --seeds 1 --precision fp32")
    assert said.status == 1
    assert "1 of 4 runs are not finished" in said.err and "not finite" in said.err
    assert len(finished(tmp_path / "out")) == 3
    assert "Tiny table" in said.out


def test_a_table_that_names_a_file_of_code_needs_a_persons_word(command: Command, tmp_path, table):
    write_factory(tmp_path)
    row = TABLE["rows"][0] | {"student": "net.py:make", "teacher": "net.py:make_normalised"}
    table.write_text(yaml.safe_dump(TABLE | {"rows": [row]}, sort_keys=False))
    said = command(f"{LINE} --seeds 1")
    assert said.status == 2
    assert "add --trust-code" in said.err
    said = command(f"{LINE} --seeds 1 --trust-code")
    assert (said.status, said.err) == (0, "")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("reproduce table6", "did you mean table"),
        ("reproduce", "TABLE"),
        ("reproduce table1 --rows wrn-40-2:wrn-16-1", "unknown row"),
        ("reproduce table5", "--data folder:IMAGENET"),
        ("reproduce table1 --epochs 0", "epochs is 0"),
    ],
)
def test_mistakes_are_one_line(command: Command, line, words):
    said = command(line)
    assert said.status == 2
    assert words in said.err and said.err.count("\n") == 1


def test_with_views_the_teacher_speaks_once(command: Command, table: Path, tmp_path):
    settings = {
        "student alone": {"method": "none"},
        "KD": {"method": "kd"},
        "F-ActT": {"method": "full"},
    }
    table.write_text(yaml.safe_dump(TABLE | {"settings": settings}, sort_keys=False))
    said = command(f"{LINE} --seeds 2 --views 1")
    assert (said.status, said.err) == (0, "")
    (filled,) = (tmp_path / "out" / "stores").rglob("logits.filled.npy")
    assert np.load(filled).sum() == 2 * 64  # each seed draws its own images
