"""The studies: their plans, their tables and plots, with runs of a step or two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_runs import Command, write_folder

from attention_transfer.errors import UserError
from attention_transfer.options import from_mapping
from attention_transfer.studies.changed import changes_of_study
from attention_transfer.studies.compute import saved_mib, step_flops
from attention_transfer.studies.cost import split_pair
from attention_transfer.studies.options import StudyOptions
from attention_transfer.studies.plan import make_plan
from attention_transfer.studies.run_studies import TABLES
from attention_transfer.studies.study import beta_curves
from attention_transfer.studies.study_notes import localisation_notes, runs_by_method
from attention_transfer.studies.summaries import Cell, TableData

SMALL = "--limit-train 64 --limit-val 60 --batch-size 32 --device cpu --compile off --epochs 1"
NETS = "--student wrn-10-1 --teacher wrn-10-1"
PNG = b"\x89PNG"


def table_of(name: str, changes=None, **options):
    given = from_mapping(StudyOptions, {"study": name, **options})
    return TABLES[name](given, dict(changes or {}))


def recipes_of(name: str, root: Path, changes=None, **options):
    changes = dict(changes or {})
    given = from_mapping(StudyOptions, {"study": name, **options})
    table = TABLES[name](given, changes)
    plan = make_plan(table, table.rows, 1, root, {}, changes)
    return {(e.row.name, e.setting): plan.tasks[e.folders[0].path].recipe for e in plan.entries}


def test_beta_has_a_curve_for_every_convention_and_decay():
    table = table_of("beta", values="1,10")
    assert len(table.settings) == 1 + 3 * 2 * 2 + 1
    data = TableData({}, [Cell("", name) for name in table.settings])
    curves = beta_curves(data)
    assert {c: {d: list(v) for d, v in by.items()} for c, by in curves.items()} == {
        convention: {"constant": [1.0, 10.0], "linear": [1.0, 10.0]}
        for convention in ("authors", "paper", "caffe")
    }


def test_few_labels_has_more_epochs_for_fewer_labels_and_one_teacher(tmp_path):
    recipes = recipes_of("few-labels", tmp_path, values="1,100", methods="kd")
    few, all_labels = recipes["1 %", "KD"], recipes["100 %", "KD"]
    assert (few.limit_train, all_labels.limit_train) == (120, 12000)
    assert (few.epochs, all_labels.epochs) == (240, 24)
    assert few.teacher == all_labels.teacher
    assert recipes["1 %", "teacher"].limit_train is None
    # As the command line has them: text.
    small = {"limit_train": "500", "epochs": "2"}
    recipes = recipes_of("few-labels", tmp_path, small, values="1,100", methods="kd")
    assert (recipes["1 %", "KD"].limit_train, recipes["1 %", "KD"].epochs) == (5, 20)
    assert (recipes["1 %", "teacher"].limit_train, recipes["1 %", "teacher"].epochs) == (500, 2)


def test_mechanisms_have_the_same_flops(tmp_path):
    recipes = recipes_of("mechanisms", tmp_path, {"epochs": 100}, methods="at,gradient,kd")
    epochs = {setting: recipe.epochs for (_, setting), recipe in recipes.items()}
    assert epochs["AT"] == 100
    assert epochs["student alone"] > 100 > epochs["gradient"]
    base = recipes["", "AT"]
    spent = {}
    for method, setting in (("none", "student alone"), ("at", "AT"), ("gradient", "gradient")):
        spent[method] = epochs[setting] * step_flops(base, "nin-wide-no-bn", method)
    assert spent["none"] == pytest.approx(spent["at"], rel=0.02)
    assert spent["gradient"] == pytest.approx(spent["at"], rel=0.02)


def test_the_teacher_of_the_same_network_has_another_seed(tmp_path):
    recipes = recipes_of("same-architecture", tmp_path)
    same = recipes["same", "teacher"]
    assert same.model == recipes["same", "AT"].model
    assert same.seed not in range(100)
    assert recipes["weaker", "teacher"].model == "wrn-10-1"
    assert recipes["weaker", "teacher"].limit_train == recipes["weaker", "AT"].limit_train


def test_beta_is_auto_whatever_the_recipe_says(tmp_path):
    """cifar10-paper and cifar10-gradient ask for the published β."""
    for study, recipe in (
        ("same-architecture", "cifar10-paper"), ("localisation", "cifar10-paper"),
        ("few-labels", "cifar10-paper"), ("mechanisms", "cifar10-gradient"),
    ):  # fmt: skip
        recipes = recipes_of(study, tmp_path, {"epochs": 12}, recipe=recipe, data="digits")
        betas = {r.method: r.beta for r in recipes.values() if "at" in r.method.split("+")}
        assert len(betas) > 1
        assert {b["at"] if isinstance(b, dict) else b for b in betas.values()} == {"auto"}, betas


def test_a_stronger_teacher_is_stronger(command: Command):
    said = command("study same-architecture --student wrn-40-2")
    assert said.status == 2
    assert "with --student wrn-40-2, expected --teacher" in said.err


def test_localisation_has_networks_of_many_strengths(tmp_path):
    recipes = recipes_of("localisation", tmp_path)
    assert len(recipes) >= 10
    assert {recipe.epochs for recipe in recipes.values()} >= {2, 6, 12, 24}


def test_the_drops_of_the_rate_keep_their_place(tmp_path):
    """cifar10-paper drops the rate at the start of epochs 60, 120 and 160 of 200."""
    paper = {"recipe": "cifar10-paper", "data": "digits"}
    recipes = recipes_of("few-labels", tmp_path, methods="kd", **paper)
    drops = {r.epochs: r.milestones for r in recipes.values()}
    assert drops == {200: (60, 120, 160), 632: (187, 377, 503), 2000: (591, 1191, 1591)}
    recipes = recipes_of("localisation", tmp_path, {"epochs": 24}, methods="at", **paper)
    drops = {r.epochs: r.milestones for r in recipes.values()}
    assert drops == {24: (8, 15, 20), 12: (5, 8, 11), 6: (3, 5, 6), 2: (2,)}
    own = {"epochs": 24, "milestones": (13,)}
    recipes = recipes_of("localisation", tmp_path, own, methods="at", values="12,24", **paper)
    assert {r.epochs: r.milestones for r in recipes.values()} == {24: (13,), 12: (7,)}


def test_localisation_without_boxes_is_refused_before_training(command: Command, tmp_path):
    data = write_folder(tmp_path / "photos", classes=3)
    said = command(
        f"study localisation {NETS} {SMALL} --data folder:{data} --image-size 16 --out o"
    )
    assert said.status == 2
    assert f"needs boxes of objects, but folder:{data} has none" in said.err
    assert not (tmp_path / "o" / "runs").exists()


def test_correlations_are_those_of_the_runs():
    cells = []
    for setting, shift in (("student alone, 2 epochs", 0.0), ("AT, 2 epochs", 10.0)):
        runs = []
        for seed in range(4):
            share = 20.0 + shift + seed
            runs.append(
                {"seed": seed, "epochs": 2, "error": 60 - share,
                 "in_box": share + 0.1 * shift * seed, "pointing": 50.0 + (seed % 2)}
            )  # fmt: skip
        cells.append(Cell("", setting, runs))
    teacher = {"seed": 0, "epochs": 2, "error": 5.0, "in_box": 60.0, "pointing": 60.0}
    cells.append(Cell("", "teacher", [teacher]))
    data = TableData({}, cells)
    assert set(runs_by_method(data)) == {"student alone", "AT", "teacher"}
    notes = localisation_notes(data)
    assert any(note.startswith("Rank correlation of accuracy and attention inside the box, all "
                               "networks: 1.00") for note in notes)  # fmt: skip
    # The teacher is another network, trained on other images: it is no student of that length.
    after = [note for note in notes if "Rank" in note and "after 2 epochs: " in note]
    assert after and all(note.endswith("n = 8") for note in after)
    assert any("AT after 2 epochs" in note and "+11.5 points" in note for note in notes)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"study localisation {NETS} {SMALL} --methods at --values 1 --seeds 2", "AT, 1 epoch"),
        (f"study same-architecture {NETS} {SMALL} --methods kd --seeds 2", "same: WRN-10-1"),
    ],
)
def test_a_study_writes_its_table_and_plot(command: Command, tmp_path, line, words):
    said = command(f"{line} --out out")
    assert (said.status, said.err) == (0, "")
    name = line.split()[1]
    (page,) = (tmp_path / "out").glob(f"study-{name}*.md")
    assert words in page.read_text()
    (picture,) = (tmp_path / "out").glob(f"study-{name}*.png")
    assert picture.read_bytes().startswith(PNG)


@pytest.mark.parametrize("name", ["beta", "few-labels"])
def test_curves_are_drawn(name, tmp_path):
    from attention_transfer.studies.study import draw

    table = table_of(name)
    cells = []
    for row in table.rows:
        for setting in row.settings or table.settings:
            runs = [{"seed": seed, "error": 10.0 + seed} for seed in range(3)]
            cells.append(Cell(row.name, setting, runs))
    draw(name, TableData({}, cells), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


def test_a_smaller_study_has_files_of_its_own():
    stems = {
        changes_of_study(
            from_mapping(StudyOptions, {"study": "beta"} | given), given, changes
        ).stem("study-beta")
        for given, changes in (
            ({}, {}),
            ({"seeds": 1}, {}),
            ({"values": "1"}, {}),
            ({}, {"epochs": 2}),
        )
    }
    assert len(stems) == 4 and "study-beta" in stems


def test_cost_measures_every_form(command: Command, tmp_path, monkeypatch):
    monkeypatch.setattr("attention_transfer.apply.speed.ROUND_SECONDS", 0.0)
    said = command("study cost --pairs wrn-10-2:wrn-10-1 --batch-size 2 --device cpu --out out")
    assert (said.status, said.err) == (0, "")
    stem = str(tmp_path / "out" / "study-cost-pairs=wrn-10-2-wrn-10-1-batch_size=2")
    lines = Path(f"{stem}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[1:]]
    forms = {(row["role"], row["form"]) for row in rows}
    assert forms >= {(r, f) for r in ("teacher", "student") for f in ("fp32", "exported")}
    teacher, student = (
        next(row for row in rows if row["role"] == role) for role in ("teacher", "student")
    )
    for key in ("parameters", "flops", "activation_mib"):
        assert teacher[key] > student[key] > 0
    page = Path(f"{stem}.md").read_text()
    ratio = teacher["parameters"] / student["parameters"]
    assert f"| wrn-10-2 → wrn-10-1 | {ratio:.1f} |" in page
    assert Path(f"{stem}.png").read_bytes().startswith(PNG)


def test_activations_that_are_kept():
    """A layer keeps its input; ReLU keeps its output, which is the next layer's input."""
    from torch import nn

    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    images = torch.rand(32, 8)
    logits = 32 * 4  # kept by the cross-entropy as log-probabilities
    expected = 4 * (32 * 8 + 32 * 16 + logits)
    # The labels and the weight of the loss are small.
    assert saved_mib(network, images) * 2**20 == pytest.approx(expected, abs=32 * 8 + 64)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("study betta", "did you mean beta"),
        ("study cost --seeds 3", "--seeds is given, but study cost does not read it"),
        ("study cost --epochs 3", "trains nothing"),
        ("study beta --pairs a:b", "does not read it"),
        ("study beta --conventions mine", "expected one of authors, paper, caffe"),
        ("study few-labels --values 0", "expected positive numbers"),
        ("study few-labels --values 101", "at most 100"),
        ("study localisation --values 1.5", "expected whole numbers"),
        ("study cost --pairs wrn-10-1:wrn-10-1,oops", "expected TEACHER:STUDENT"),
        ("study cost --pairs wrn-10-1", "expected TEACHER:STUDENT"),
    ],
)
def test_mistakes_are_one_line(command: Command, line, words):
    said = command(line)
    assert said.status == 2
    assert words in said.err and said.err.count("\n") == 1


def test_names_of_pairs():
    assert split_pair("timm/a:pretrained:zoo:b") == ("timm/a:pretrained", "zoo:b")
    assert split_pair("nets.py:make:wrn-16-1") == ("nets.py:make", "wrn-16-1")
    with pytest.raises(UserError):
        split_pair("a:b:c")
