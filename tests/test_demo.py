"""The demo's story, told with runs of a step or two."""

from __future__ import annotations

import json

import pytest
from small_runs import FLAGS, contents

from attention_transfer import demo
from attention_transfer.config import make_recipe, named_recipe

METHODS = ("none", "at", "kd", "at+kd")


@pytest.fixture
def short(monkeypatch):
    """The demo's recipes, cut down."""
    small = {
        "model": "wrn-10-1",
        "limit_train": 64,
        "limit_val": 50,
        "epochs": 1,
        "batch_size": 32,
        "device": "cpu",
    }
    monkeypatch.setattr(demo, "named_recipe", lambda name: named_recipe(name) | small)


def test_the_whole_story_and_again(command, short, tmp_path):
    said = command("demo --out runs --seeds 2")
    assert (said.status, said.err) == (0, "")
    runs = {"teacher"} | {f"{method}/seed-{seed}" for method in METHODS for seed in (0, 1)}
    assert {
        str(f.parent.relative_to(tmp_path / "runs")) for f in tmp_path.rglob("summary.json")
    } == runs
    for run in runs - {"teacher"}:
        summary = json.loads((tmp_path / "runs" / run / "summary.json").read_text())
        assert summary["method"] == run.split("/")[0]
        assert (summary["teacher"] is None) == (summary["method"] == "none")
    assert said.out.count("runs/report.html") == 2  # after the first seed and at the end
    first, _, rest = said.out.partition("1 more seed will show the spread")
    assert "at/seed-1" in rest and "seed-1" not in first
    for method in ("AT", "KD", "AT+KD"):
        assert method in said.out
    before = contents(tmp_path / "runs")
    del before["report.html"]
    said = command("demo --out runs --seeds 2")
    assert said.out.count("is finished") == len(runs)
    after = contents(tmp_path / "runs")
    assert {name: after[name] for name in before} == before


def test_the_students_have_the_same_budget_and_less_than_the_teacher(tmp_path):
    teacher = named_recipe("digits-teacher")
    kept = [demo.student_recipe(method, tmp_path, 0).to_dict() for method in demo.METHODS]
    for recipe in kept:
        differing = {key for key, value in recipe.items() if value != kept[0][key]}
        assert differing <= {"method", "teacher", "store", "beta"}
    assert [recipe["method"] for recipe in kept] == list(METHODS)
    assert not kept[0]["flip"]
    assert not teacher["flip"]
    assert kept[0]["limit_train"] < 12_000


@pytest.mark.parametrize(
    "name", ["cifar10-paper", "cifar10-short", "digits-student", "digits-teacher"]
)
def test_every_recipe_is_valid_and_opens_with_its_command(name, tmp_path):
    from importlib.resources import files

    make_recipe({"model": "wrn-16-1"}, named_recipe(name))
    text = (files("attention_transfer.recipes") / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert f"--recipe {name}" in text


def test_the_recipes_work_on_the_command_line(command, teacher_run, tmp_path):
    words = f"{FLAGS.replace('--epochs 2', '--epochs 1')} --max-steps 1 --model wrn-10-1"
    assert command(f"train --recipe digits-teacher {words} --out a").status == 0
    said = command(
        f"distill --recipe digits-student --teacher {teacher_run} --method at+kd {words} --out b"
    )
    assert said.status == 0
