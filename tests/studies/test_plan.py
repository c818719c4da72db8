"""The plan of a table: each run once, shared between rows and tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from attention_transfer.errors import UserError
from attention_transfer.studies.options import named_specs
from attention_transfer.studies.plan import make_plan
from attention_transfer.studies.table_file import chosen_rows, parse_table, read_table


def plan_of(name: str, root: Path, rows=(), seeds=2, data=None, **changes):
    table = read_table(name)
    return make_plan(table, chosen_rows(table, rows), seeds, root, data, changes)


def test_teachers_and_lone_students_are_shared_between_rows(tmp_path):
    plan = plan_of("table1", tmp_path, seeds=5)
    # 4 rows of 5 settings, less WRN-16-1 alone, which two rows have; three teachers with a run of
    # their own, because the fourth is WRN-16-2 alone.
    assert len(plan.tasks) == 5 * (4 * 5 - 1) + 3
    assert len(plan.entries) == 4 * 6


def test_tables_share_runs(tmp_path):
    first = plan_of("table1", tmp_path, ["wrn-16-2:wrn-16-1"])
    second = plan_of("table2", tmp_path)
    shared = first.tasks.keys() & second.tasks.keys()
    # The teacher, the student alone and F_sum², which is the AT of Table 1, with two seeds each.
    assert len(shared) == 1 + 2 + 2


def test_a_student_waits_for_its_teacher(tmp_path):
    plan = plan_of("table1", tmp_path, ["wrn-16-2:wrn-16-1"], seeds=1)
    teacher = next(task for task in plan.tasks.values() if task.recipe.model == "wrn-16-2")
    for task in plan.tasks.values():
        needs = task.recipe.method not in ("none", "symmetry")
        assert task.recipe.teacher == (str(teacher.folder) if needs else None)
        assert [str(folder) for folder in task.after] == ([str(teacher.folder)] if needs else [])
    assert next(iter(plan.tasks)) == teacher.folder.path


def test_where_the_folder_is_does_not_change_the_names(tmp_path):
    one, other = (plan_of("table1", tmp_path / name, seeds=1) for name in ("a", "b"))
    names = [[str(path.relative_to(plan.root)) for path in plan.tasks] for plan in (one, other)]
    assert names[0] == names[1]
    assert any(name.startswith("runs/wrn-16-1/at-") for name in names[0])


def test_a_shorter_run_is_another_run_and_keeps_its_drops(tmp_path):
    long, short = (plan_of("table1", tmp_path, seeds=1, **c) for c in ({}, {"epochs": 20}))
    assert not long.tasks.keys() & short.tasks.keys()
    recipe = next(iter(short.tasks.values())).recipe
    assert (recipe.epochs, recipe.milestones) == (20, (7, 13, 17))
    one = next(iter(plan_of("table1", tmp_path, seeds=1, epochs=1).tasks.values())).recipe
    assert one.milestones == ()
    # As the command line has them: text.
    plan = plan_of("table1", tmp_path, seeds=1, epochs="20", milestones="5,15")
    assert next(iter(plan.tasks.values())).recipe.milestones == (5, 15)


def test_data_of_the_command_replaces_that_of_the_file(tmp_path):
    row = {"student": "wrn-10-1"}
    options = {"data": "folder:photos", "image_size": 48}
    settings = {"student alone": {"method": "none"}}
    about = {"title": "T", "options": options, "settings": settings, "rows": [row]}
    table = parse_table(about, "mine.yaml")
    for data, expected in ((None, "folder:photos"), ({"": "folder:cars"}, "folder:cars")):
        (task,) = make_plan(table, table.rows, 1, tmp_path, data, {}).tasks.values()
        assert (task.recipe.data, task.recipe.image_size) == (expected, 48)


def test_methods_without_a_teacher_get_none(tmp_path):
    plan = plan_of("table3", tmp_path, seeds=1)
    by_method = {task.recipe.method: task.recipe for task in plan.tasks.values()}
    assert by_method["symmetry"].teacher is None
    assert by_method["min-l2"].teacher is None
    assert by_method["gradient"].teacher is not None


def test_specs_by_name_may_name_columns():
    given = "cub=parquet:a#image=photo,label=breed,scenes=wds:{x,y}.tar"
    expected = {"cub": "parquet:a#image=photo,label=breed", "scenes": "wds:{x,y}.tar"}
    assert named_specs(given) == expected


def test_data_of_ones_own_is_asked_for_by_name(tmp_path):
    with pytest.raises(UserError, match="needs your copy of cub, scenes: --data cub=folder:CUB"):
        plan_of("table4", tmp_path)
    with pytest.raises(UserError, match="names 'birds': expected cub, scenes, imagenet"):
        plan_of("table4", tmp_path, data={"birds": "folder:b"})
    with pytest.raises(UserError, match="--data folder:IMAGENET"):
        plan_of("table5", tmp_path)
    plan = plan_of("table5", tmp_path, data={"": "folder:i"}, seeds=1)
    assert {task.recipe.data for task in plan.tasks.values()} == {"folder:i"}


def test_pretrained_weights_come_from_the_library_or_from_a_run(tmp_path):
    data = {"cub": "folder:c", "scenes": "folder:s"}
    plan = plan_of("table4", tmp_path, data=data, seeds=1)
    assert {task.recipe.model for task in plan.tasks.values()} == {
        "torchvision/resnet18:pretrained",
        "torchvision/resnet34:pretrained",
    }
    plan = plan_of("table4", tmp_path, data=data | {"imagenet": "folder:i"}, seeds=1)
    pretraining = [t for t in plan.tasks.values() if t.recipe.data == "folder:i"]
    assert {task.recipe.model for task in pretraining} == {
        "torchvision/resnet18", "torchvision/resnet34",
    }  # fmt: skip
    for task in plan.tasks.values():
        if task not in pretraining:
            assert task.recipe.student_weights in map(str, (t.folder for t in pretraining))
            assert task.recipe.student_weights in map(str, task.after)


def test_another_number_of_views_is_another_store(tmp_path):
    def stores(**changes) -> set[str]:
        plan = plan_of("table1", tmp_path, ["wrn-16-2:wrn-16-1"], seeds=2, **changes)
        return {task.recipe.store for task in plan.tasks.values()} - {None}

    four, eight = stores(views=4), stores(views=8)
    assert len(four) == len(eight) == 1
    assert four != eight
    # A part of the same images has another teacher here, but its store could be the same one.
    part, smaller = stores(views=4, limit_train=100), stores(views=4, image_size=16)
    names = [Path(*store).name for store in (four, part, smaller)]
    assert names[0] == names[1] != names[2]


def test_with_views_the_students_of_a_teacher_share_a_store(tmp_path):
    plan = plan_of("table1", tmp_path, ["wrn-16-2:wrn-16-1"], seeds=1, views=4)
    by_method = {task.recipe.method: task.recipe for task in plan.tasks.values() if task.after}
    assert {recipe.views for recipe in by_method.values()} == {4}
    assert by_method["at"].store == by_method["kd"].store
    assert Path(by_method["at"].store).is_relative_to(tmp_path / "stores")
    teacher = next(iter(plan.tasks.values())).recipe
    assert (teacher.command, teacher.views) == ("train", None)
    assert not plan.tasks.keys() & plan_of("table1", tmp_path / "b", seeds=1).tasks.keys()
