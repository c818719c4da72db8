"""Teachers that are not among the runs: their rows, curves and maps; and runs of the authors."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
from rich.console import Console
from small_runs import carry_out, distilled

from attention_transfer.errors import UserError
from attention_transfer.report import group_runs, print_table, read_run, write_report
from attention_transfer.report.browser import make_browser
from attention_transfer.report.summary_text import caveats
from attention_transfer.report.teachers import with_teachers
from attention_transfer.run_folder import RunFolder, find_runs


def log_line(epoch, **options):
    common = {
        "depth": 16, "width": 1, "dataset": "CIFAR10", "batch_size": 128, "lr": 0.1, "epochs": 3,
        "weight_decay": 5e-4, "epoch_step": "[60,120,160]", "lr_decay_ratio": 0.2, "alpha": 0,
        "beta": 0, "teacher_id": "", "temperature": 4, "n_parameters": 175_994,
        "train_loss": 1.0, "test_loss": 0.9, "test_acc": 60.0 + epoch, "train_acc": 70.0,
    }  # fmt: skip
    return f"json_stats: {json.dumps(common | options | {'epoch': epoch})}\n"


def write_authors(folder, epochs=3, **options):
    folder.mkdir(parents=True)
    (folder / "model.pt7").write_bytes(b"")
    (folder / "log.txt").write_text("".join(log_line(e, **options) for e in range(1, epochs + 1)))
    return folder


def store_teacher_maps(folder: RunFolder) -> None:
    """As a run does: the teacher's maps of the same images beside the student's."""
    with np.load(folder.maps_file) as file:
        arrays = dict(file)
    teacher = {
        f"teacher.{name}": array
        for name, array in arrays.items()
        if name.startswith(("map.", "stages", "predictions"))
    }
    np.savez(folder.maps_file, **arrays, **teacher)


def keep_images(folder: RunFolder, chosen: slice) -> None:
    with np.load(folder.maps_file) as file:
        arrays = dict(file)
    for name in ("images", "labels", "boxes", "predictions", "map.0", "map.1", "map.2"):
        arrays[name] = arrays[name][chosen]
    np.savez(folder.maps_file, **arrays)


def test_a_run_of_its_own_shows_its_teachers_curve_and_map(tmp_path, make_run):
    make_run(tmp_path, "teacher", "teacher", 0, 22.0)
    student = make_run(tmp_path, "at", "at", 0, 30.0)
    store_teacher_maps(student)
    teacher, row = with_teachers(group_runs([read_run(student)]))
    assert (teacher.label, row.label) == ("WRN-16-2 teacher", "AT")
    assert row.teacher is teacher
    assert len(teacher.first.metrics) == 12
    browser = make_browser([teacher, row])
    assert browser.networks == [teacher, row]
    assert [network["teacher"] for network in browser.data["networks"]] == [None, 0]
    write_report([read_run(student)], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "WRN-16-2 teacher ends at " in page
    assert '"label": "WRN-16-2 teacher"' in page


def test_a_teacher_that_is_no_run_has_a_row_a_level_and_maps(tmp_path, make_run):
    student = make_run(tmp_path, "at", "at", 0, 30.0, teacher="timm/resnet34:pretrained")
    store_teacher_maps(student)
    run = read_run(student)
    run.summary["teacher"] |= {"folder": None, "model": "timm/resnet34:pretrained"}
    write_report([run], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "timm/resnet34:pretrained teacher is at 22.0 %" in page
    assert '"label": "timm/resnet34:pretrained teacher"' in page
    assert "1 setting<" in page


def test_a_teacher_is_the_baseline_in_the_run_of_its_own(tmp_path, make_run):
    alone = {"command": "train", "teacher": None, "method": None}
    folder = make_run(tmp_path, "alone", "none", 0, 34, **alone)
    run = read_run(make_run(tmp_path, "at", "at", 0, 30, teacher=str(folder)))
    run.summary["teacher"] |= {"folder": str(folder), "model": "wrn-16-1", "val_accuracy": 0.66}
    rows = with_teachers(group_runs([run]))
    assert rows[1].delta == pytest.approx(-4.0)
    shutil.rmtree(folder.path)  # its budget is not known any more
    assert with_teachers(group_runs([run]))[1].delta is None


def test_a_teachers_folder_with_other_weights_lends_no_curve(tmp_path, make_run):
    folder = make_run(tmp_path, "teacher", "teacher", 0, 22.0)
    folder.student_file.write_bytes(b"trained again")
    run = read_run(make_run(tmp_path, "at", "at", 0, 30.0))
    run.environment["teacher"] = "0" * 64
    assert with_teachers(group_runs([run]))[0].first.metrics == []


def test_a_curve_on_other_images_is_said(tmp_path, make_run):
    make_run(tmp_path, "teacher", "teacher", 0, 25.0)  # the student's run measured 22 %
    rows = with_teachers(group_runs([read_run(make_run(tmp_path, "at", "at", 0, 30.0))]))
    assert any("its curve, from its own run, ends at 25.9 %" in line for line in caveats(rows))


def test_an_image_has_the_maps_of_the_networks_that_saw_it(tmp_path, make_run):
    folders = [make_run(tmp_path, method, method, 0, 30.0) for method in ("at", "kd", "at+kd")]
    keep_images(folders[0], slice(0, 6))
    keep_images(folders[1], slice(4, 12))
    browser = make_browser(group_runs([read_run(folder) for folder in folders]))
    seen = [[maps is not None for maps in image["seen"]] for image in browser.data["images"]]
    assert len(seen) == 12
    assert seen.count([True, False, True]) == 4
    assert seen.count([True, True, True]) == 2
    assert seen.count([False, True, True]) == 6


def test_runs_with_other_limits_store_maps_of_the_same_images(teacher_run, tmp_path, quick_runs):
    carry_out(distilled(teacher_run, epochs=1, max_steps=1), tmp_path / "a")
    recipe = distilled(teacher_run, epochs=1, max_steps=1, limit_val=60)
    carry_out(recipe, tmp_path / "b")
    with np.load(tmp_path / "a" / "maps.npz") as a, np.load(tmp_path / "b" / "maps.npz") as b:
        assert (a["images"] == b["images"]).all()
        assert len(a["images"]) == 32
        assert a["teacher.map.0"].shape[0] == 32
        assert len(a["teacher.predictions"]) == 32
    page = (tmp_path / "a" / "report.html").read_text()
    assert "WRN-10-1 teacher" in page
    assert '"label": "WRN-10-1 teacher"' in page


def test_runs_of_the_authors_are_compared(tmp_path):
    # WRN-16-2 has 691,674 weights; the log counts two statistics for each of 912 channels, too.
    logged = 691_674 + 2 * 912
    teacher = write_authors(tmp_path / "logs" / "resnet_16_2_teacher", width=2, n_parameters=logged)
    student = write_authors(
        tmp_path / "logs" / "at_16_1_16_2", beta=1000.0, teacher_id="resnet_16_2_teacher"
    )
    folders = find_runs([tmp_path / "logs"])
    assert [folder.path for folder in folders] == [student, teacher]
    rows = group_runs([read_run(folder) for folder in folders])
    assert [row.label for row in rows] == ["WRN-16-2 teacher", "AT"]
    assert rows[1].error.mean == pytest.approx(37.0)
    assert rows[1].teacher is rows[0]
    assert rows[0].first.summary["parameters"] == 691_674
    assert len(rows[1].first.metrics) == 3
    out = io.StringIO()
    print_table(rows, Console(file=out, width=120))
    assert "37.0" in out.getvalue()
    write_report([read_run(folder) for folder in folders], tmp_path / "r.html")
    assert "AT ends at 37.0 %" in (tmp_path / "r.html").read_text()


def test_top5_half_a_line_and_an_unfinished_log_of_the_authors(tmp_path):
    folder = write_authors(tmp_path / "run", epochs=2, test_acc=[70.0, 90.0])
    with (folder / "log.txt").open("a") as log:
        log.write('json_stats: {"depth": 1')
    run = read_run(RunFolder(folder))
    assert not run.finished
    assert run.metrics[-1]["val_top5"] == 0.9
    (folder / "log.txt").unlink()
    with pytest.raises(UserError, match=r"has no log\.txt"):
        read_run(RunFolder(folder))


def test_an_epoch_that_is_no_number(tmp_path):
    folder = write_authors(tmp_path / "run", epochs=2)
    text = (folder / "log.txt").read_text()
    (folder / "log.txt").write_text(text.replace('"epoch": 1}', '"epoch": [1]}'))
    run = read_run(RunFolder(folder))
    assert [row["epoch"] for row in run.metrics] == [None, 2]


def test_compare_takes_folders_of_the_authors(command, tmp_path):
    write_authors(tmp_path / "run", beta=1000.0, alpha=0.9, teacher_id="elsewhere")
    said = command("compare run --out r.html")
    assert (said.status, said.err) == (0, "")
    assert "AT+KD" in said.out
