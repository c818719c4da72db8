"""What a run leaves in its folder, and that it can be read back."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_runs import (
    FLAGS,
    STEPS_PER_EPOCH,
    carry_out,
    distilled,
    rows,
    small,
    write_folder,
)

import attention_transfer as at
from attention_transfer.apply.evaluate import evaluate, evaluate_network
from attention_transfer.apply.inference import as_input
from attention_transfer.data.open import open_data
from attention_transfer.train.assemble import assemble

pytestmark = pytest.mark.usefixtures("quick_runs")

FILES = {
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "checkpoint.pt",
    "student.safetensors",
    "maps.npz",
    "predictions.npz",
    "report.html",
    "summary.json",
}
METRICS = {
    "gradients",
    *("epoch", "step", "lr", "train_loss", "val_loss", "train_accuracy", "val_accuracy"),
    *("parts", "weights", "images_per_second", "seconds"),
}


def names(folder):
    return {f.name for f in folder.iterdir()}


def read(file):
    return json.loads(
        file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON")
    )


def test_the_predictions_are_those_of_the_exported_weights(student_run, teacher_run):
    with np.load(student_run / "predictions.npz") as file:
        stored = dict(file)
    data = open_data("digits", limit_train=1, limit_val=100).val
    for name, run in (("student", student_run), ("teacher", teacher_run)):
        network = at.load_student(run)
        with torch.no_grad():
            expected = network(as_input(data.batch(slice(None)))).argmax(1).numpy()
        # The teacher ran in the precision of the run.
        assert (stored[name] == expected).mean() > 0.97
    assert (stored["labels"] == data.labels.numpy()).all()
    assert [*stored["classes"]] == [str(digit) for digit in range(10)]
    assert stored["labels"].dtype == np.uint8


@pytest.mark.parametrize("summary", ["{}", '{"final": null}'])
def test_a_teacher_without_a_recorded_accuracy(teacher_run, tmp_path, summary):
    teacher = shutil.copytree(teacher_run, tmp_path / "teacher")
    (teacher / "summary.json").write_text(summary)
    carry_out(distilled(teacher, epochs=1), tmp_path / "run")
    assert names(tmp_path / "run") == FILES


def test_the_files_of_train(teacher_run):
    assert names(teacher_run) == FILES


@pytest.mark.parametrize("method", ["none", "at", "kd"])
def test_the_files_of_distill(teacher_run, tmp_path, method):
    given = {} if method == "none" else {"teacher": str(teacher_run)}
    if method == "at":
        given["beta"] = 1.0
    carry_out(small(command="distill", method=method, epochs=1, **given), tmp_path / "run")
    assert names(tmp_path / "run") == FILES
    (row,) = rows(tmp_path / "run")
    terms = {"ce"} | {"none": set(), "at": {"at"}, "kd": {"kd"}}[method]
    assert set(row["parts"]) == terms
    # A student that learns alone has nothing to balance.
    assert row.get("gradients", {}).keys() == (set() if method == "none" else terms)
    assert row["weights"] == {"none": {}, "at": {"beta": 1.0}, "kd": {"alpha": 0.9}}[method]
    share = 1 - row["weights"].get("alpha", 0)
    assert row["parts"]["ce"] == pytest.approx(share * row["train_loss"], rel=1e-4)


def test_a_teacher_without_a_method(command, teacher_run, tmp_path):
    line = f"distill --student wrn-10-1 --max-steps 2 {FLAGS} --beta 1"
    said = command(f"{line} --teacher {teacher_run} --out run")
    assert (said.status, said.err) == (0, "")
    assert "method at+kd: the default with a teacher" in said.out
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["method"] == "at+kd"
    assert set(rows(tmp_path / "run")[-1]["parts"]) == {"ce", "at", "kd"}


def test_no_teacher_and_no_method(command, tmp_path):
    said = command(f"distill --student wrn-10-1 --max-steps 2 {FLAGS} --out run")
    assert (said.status, said.err) == (0, "")
    assert said.out.startswith("wrn-10-1 on digits: ")
    assert "method none: the student alone" in said.out
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["method"] == "none"


def test_metrics(student_run):
    found = [json.loads(line) for line in (student_run / "metrics.jsonl").read_text().splitlines()]
    assert [set(row) for row in found] == [METRICS] * 2
    assert [(row["epoch"], row["step"]) for row in found] == [
        (1, STEPS_PER_EPOCH),
        (2, 2 * STEPS_PER_EPOCH),
    ]
    for row in found:
        assert set(row["parts"]) == {"ce", "at", "kd"}
        assert all(value > 0 for value in row["parts"].values())
        assert set(row["gradients"]) == {"ce", "at", "kd"}
        assert all(value > 0 for value in row["gradients"].values())
        assert 0 <= row["train_accuracy"] <= 1
        assert 0 <= row["val_accuracy"] <= 1
        assert row["images_per_second"] > 0
    assert found[0]["seconds"] < found[1]["seconds"]
    # β of at+kd goes to zero linearly; the last step of each epoch is the one that is written down.
    total = 2 * STEPS_PER_EPOCH
    assert [row["weights"]["beta"] for row in found] == pytest.approx(
        [1 - 3 / total, 1 - 7 / total]
    )
    assert [row["weights"]["alpha"] for row in found] == [0.9, 0.9]


def test_summary(student_run, teacher_run):
    summary, last = read(student_run / "summary.json"), rows(student_run)[-1]
    seen = {k: v for k, v in last.items() if k.startswith(("train_", "val_"))}
    assert {k: v for k, v in summary["final"].items() if not k.endswith("_fp32")} == seen
    assert summary["parameters"] == sum(
        p.numel() for p in at.load_student(student_run).parameters()
    )
    assert summary["flops"] > 0
    assert summary["seconds"] > 0
    assert (summary["command"], summary["model"], summary["method"]) == (
        "distill",
        "wrn-10-1",
        "at+kd",
    )
    assert (summary["seed"], summary["epochs"]) == (0, 2)
    assert summary["teacher"]["folder"] == str(teacher_run)
    assert summary["teacher"]["val_accuracy"] == rows(teacher_run)[-1]["val_accuracy"]
    assert len(summary["attention"]["in_box"]) == 3


def test_environment(student_run):
    about = read(student_run / "environment.json")
    assert {"versions", "hardware", "commit", "command", "auto"} <= set(about)
    assert {"python", "torch", "attention-transfer"} <= set(about["versions"])
    assert {"cpu", "cores", "gpu"} <= set(about["hardware"])
    assert (about["auto"]["device"], about["auto"]["compile"]) == ("cpu", False)
    assert about["auto"]["precision"] in ("fp32", "bf16")
    assert about["auto"]["threads"] >= 1


def test_the_configuration_runs_again_as_it_is(student_run, tmp_path):
    from attention_transfer.config import make_recipe, read_recipe

    again = make_recipe(read_recipe(student_run / "config.yaml"))
    assert again.to_dict() == yaml.safe_load((student_run / "config.yaml").read_text())
    carry_out(again, tmp_path / "again")
    assert rows(tmp_path / "again") == rows(student_run)
    assert (tmp_path / "again" / "config.yaml").read_text() == (
        student_run / "config.yaml"
    ).read_text()
    ours, theirs = (load_file(f / "student.safetensors") for f in (tmp_path / "again", student_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


def test_the_student_is_the_one_that_was_measured(student_run):
    found = evaluate_network(str(student_run), device="cpu")
    last = rows(student_run)[-1]
    assert (found["accuracy"], found["images"]) == (last["val_accuracy"], 100)
    assert found["loss"] == pytest.approx(last["val_loss"], rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_precision_that_is_exported(tmp_path, precision):
    """The weights are float32; a run in bfloat16 reports their numbers in both."""
    said = carry_out(small(precision=precision, limit_val=300), tmp_path / "run")
    final = read(tmp_path / "run" / "summary.json")["final"]
    found = {p: evaluate_network(str(tmp_path / "run"), precision=p) for p in ("auto", "fp32")}
    assert [found[p]["precision"] for p in found] == [precision, "fp32"]
    assert found["auto"]["loss"] == pytest.approx(final["val_loss"], rel=1e-4)
    if precision == "fp32":
        assert [key for key in final if key.endswith("_fp32")] == []
        return
    assert final["val_loss_fp32"] == pytest.approx(found["fp32"]["loss"], rel=1e-6)
    assert final["val_loss_fp32"] != final["val_loss"]
    assert final["val_accuracy_fp32"] == found["fp32"]["accuracy"]
    assert f" % error in bf16 ({100 * (1 - final['val_accuracy_fp32']):.2f} % in fp32)" in said


def test_the_student_in_python(tmp_path):
    carry_out(small(precision="fp32"), tmp_path / "run")
    model = at.load_student(tmp_path / "run")
    assert not model.training
    assert model.class_names == tuple("0123456789")
    val = assemble(small(precision="fp32")).data.val
    found = evaluate(model, val, 100, "cpu")
    last = rows(tmp_path / "run")[-1]
    assert found["accuracy"] == last["val_accuracy"]
    assert found["loss"] == pytest.approx(last["val_loss"], rel=1e-5)


def test_another_image_size_is_kept(tmp_path):
    carry_out(small(epochs=1, image_size=24, precision="fp32"), tmp_path / "run")
    found, last = evaluate_network(str(tmp_path / "run"), device="cpu"), rows(tmp_path / "run")[-1]
    assert found["accuracy"] == last["val_accuracy"]
    assert found["loss"] == pytest.approx(last["val_loss"], rel=1e-6)


def test_the_checkpoint_holds_no_teacher(teacher_run, tmp_path):
    # The teacher is wider than the student, so that the shapes would show its tensors.
    carry_out(small(model="wrn-10-2", epochs=1, max_steps=1), tmp_path / "wide")
    carry_out(distilled(tmp_path / "wide", epochs=1, max_steps=1), tmp_path / "run")
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert all(name.startswith("student.") for name in state["transfer"])
    student = load_file(tmp_path / "run" / "student.safetensors")
    assert len(state["transfer"]) == len(student)
    alone = torch.load(teacher_run / "checkpoint.pt", weights_only=True)
    shapes = [sorted(tuple(v.shape) for v in s["transfer"].values()) for s in (state, alone)]
    assert shapes[0] == shapes[1]


def test_top5_above_ten_classes_only(teacher_run, tmp_path):
    data = write_folder(tmp_path / "data")
    carry_out(
        small(data=f"folder:{data}", limit_train=None, limit_val=None, batch_size=22, epochs=1),
        tmp_path / "run",
    )
    (row,) = rows(tmp_path / "run")
    assert row["val_accuracy"] <= row["val_top5"] <= 1
    assert row["val_top5"] * 22 == pytest.approx(round(row["val_top5"] * 22), abs=1e-4)
    assert "val_top5" in read(tmp_path / "run" / "summary.json")["final"]
    assert all("val_top5" not in row for row in rows(teacher_run))


def test_the_report_opens_without_a_network(student_run):
    page = (student_run / "report.html").read_text()
    assert re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page) == []
    assert re.findall(r"url\(\s*[\"']?(?:https?:)?//|@import", page) == []


def test_evaluation_counts_every_image_once():
    data = assemble(small()).data.val
    right = torch.nn.functional.one_hot(data.labels, 10).float()
    seen = []

    def forward(x):
        start = 32 * len(seen)
        seen.append(len(x))
        index = torch.arange(start, start + len(x)) % len(data)
        torch.testing.assert_close(x, as_input(data.batch(index)))
        return right[index] * 1e3

    found = evaluate(forward, data, 32, "cpu")
    assert seen == [32, 32, 32, 32]
    assert found == {"loss": 0.0, "accuracy": 1.0}
