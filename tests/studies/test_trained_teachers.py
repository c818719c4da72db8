"""Tables and studies with a teacher that is trained already: a run folder or `zoo:NAME`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from small_runs import Command, contents

from attention_transfer.errors import UserError
from attention_transfer.run_folder import RunFolder
from attention_transfer.studies.compute import step_flops
from attention_transfer.studies.plan import Plan, make_plan
from attention_transfer.studies.table_file import parse_table

ZOO_TEACHER = "zoo:wrn-16-2-cifar10"
FLAGS = "--seeds 1 --out out --limit-train 64 --limit-val 100 --epochs 1 --device cpu --compile off"


def table_of(teacher: str, **row) -> dict:
    return {
        "title": "Mine",
        "options": {"data": "digits", "batch_size": 32},
        "settings": {"student alone": {"method": "none"}, "KD": {"method": "kd"}},
        "rows": [{"student": "wrn-10-1", "teacher": teacher, **row}],
    }


def plan_of(teacher: str, root: Path, changes=None, **row) -> Plan:
    table = parse_table(table_of(teacher, **row), "mine.yaml")
    return make_plan(table, table.rows, 1, root, {}, changes)


def kd_of(plan: Plan):
    (task,) = (task for task in plan.tasks.values() if task.recipe.method == "kd")
    return task


@pytest.mark.parametrize("views", [{}, {"views": 4}])
def test_it_is_not_trained_again(teacher_run: Path, tmp_path, views):
    for name, recorded in ((str(teacher_run), str(teacher_run.resolve())), (ZOO_TEACHER,) * 2):
        plan = plan_of(name, tmp_path, views)
        assert [task.recipe.model for task in plan.tasks.values()] == ["wrn-10-1"] * 2
        task = kd_of(plan)
        assert task.recipe.teacher == recorded
        assert task.is_ready
        (folder,) = plan.entries[-1].folders
        assert folder.path == RunFolder(name).path.resolve()
        if views:
            assert Path(task.recipe.store).is_relative_to(tmp_path / "stores")


def test_each_teacher_has_its_own_store(teacher_run: Path, tmp_path):
    names = (str(teacher_run), ZOO_TEACHER)
    stores = [kd_of(plan_of(name, tmp_path, {"views": 4})).recipe.store for name in names]
    assert len(set(stores)) == 2


def test_the_name_of_a_network_is_one_even_if_a_folder_has_it(
    teacher_run: Path, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrn-16-2").symlink_to(teacher_run, target_is_directory=True)
    plan = plan_of("wrn-16-2", tmp_path / "out")
    assert [task.recipe.model for task in plan.tasks.values()].count("wrn-16-2") == 1


def test_mistakes_are_named(teacher_run: Path, tmp_path):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    with pytest.raises(UserError, match="is not a run folder: it has no config.yaml"):
        plan_of(str(unfinished), tmp_path)
    RunFolder(unfinished).write_config({"command": "train", "model": "wrn-10-1"})
    with pytest.raises(UserError, match="is not finished: run its command again to continue it"):
        plan_of(str(unfinished), tmp_path)
    with pytest.raises(UserError, match="has teacher_options, but its teacher is trained"):
        plan_of(str(teacher_run), tmp_path, teacher_options={"epochs": 3})
    with pytest.raises(UserError, match="the package has no model 'zoo:x'"):
        plan_of("zoo:x", tmp_path)


def test_flops_are_those_of_the_network(tmp_path, teacher_run: Path):
    recipe = kd_of(plan_of(ZOO_TEACHER, tmp_path)).recipe
    assert step_flops(recipe, ZOO_TEACHER, "kd") == step_flops(recipe, "wrn-16-2", "kd")
    model = RunFolder(teacher_run).config()["model"]
    assert step_flops(recipe, str(teacher_run), "at") == step_flops(recipe, model, "at")


def test_a_table_with_ones_own_teacher(command: Command, teacher_run: Path, tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(table_of(str(teacher_run))))
    before = contents(teacher_run)
    said = command(f"reproduce mine.yaml {FLAGS} --views 1")
    assert (said.status, said.err) == (0, "")
    assert "2 runs in" in said.out
    assert contents(teacher_run) == before
    lines = [json.loads(line) for line in next((tmp_path / "out").glob("*.jsonl")).open()]
    teacher = next(line for line in lines if line.get("setting") == "teacher")
    accuracy = RunFolder(teacher_run).summary()["final"]["val_accuracy"]
    assert teacher["error"] == pytest.approx(100 * (1 - accuracy), abs=1e-3)
    kd = next(line for line in lines if line.get("setting") == "KD")
    assert kd["teacher_error"] == teacher["error"]
    assert "2 finished" in command(f"reproduce mine.yaml {FLAGS} --views 1").out


def test_a_study_with_ones_own_teacher(command: Command, teacher_run: Path, tmp_path):
    line = f"study mechanisms --student wrn-10-1 --methods at,gradient {FLAGS}"
    said = command(f"{line} --teacher {teacher_run}")
    # The warning on batch normalisation is in the logs of the runs.
    assert (said.status, said.err) == (0, "")
    assert "3 runs in" in said.out
    said = command(f"{line} --teacher {ZOO_TEACHER}")
    assert said.status == 2
    assert "classes" in said.err
