"""The browser of images and the confusions: their numbers by hand, their order, their size."""

from __future__ import annotations

import html
import math
import re
import shlex

import numpy as np
import pytest

from attention_transfer.errors import UserError
from attention_transfer.report import group_runs, read_run, write_report
from attention_transfer.report.browser import GROUPS, counterpart, make_browser
from attention_transfer.report.confusion import compare_confusions
from attention_transfer.report.load_run import StoredMaps
from attention_transfer.report.pictures import difference_colours, pooled_map, share_in_box

CLASSES = ["cat", "dog", "cow"]


def write_answers(folder, student, **arrays) -> None:
    """predictions.npz of six images, two of each class."""
    arrays = {"labels": [0, 0, 1, 1, 2, 2], "student": student} | arrays
    numbers = {name: np.array(values, np.uint8) for name, values in arrays.items()}
    np.savez(folder.predictions_file, classes=np.array(CLASSES), **numbers)


def set_answers(folder, predictions, count: int = 5) -> None:
    """Keeps `count` images of class 0 in maps.npz, with these predictions."""
    with np.load(folder.maps_file) as file:
        arrays = dict(file)
    for name in arrays:
        if name not in ("stages", "classes"):
            arrays[name] = arrays[name][:count]
    arrays["labels"] = np.zeros(count, int)
    arrays["predictions"] = np.array(predictions)
    np.savez(folder.maps_file, **arrays)


def test_images_on_which_transfer_changed_the_answer_come_first(tmp_path, make_run):
    alone = make_run(tmp_path, "alone", "none", 0, 34)
    at = make_run(tmp_path, "at", "at", 0, 30)
    set_answers(alone, [0, 1, 1, 0, 1])
    set_answers(at, [0, 1, 2, 1, 0])
    browser = make_browser(group_runs([read_run(alone), read_run(at)]))
    groups = [title for title, _ in browser.groups]
    assert groups == [
        GROUPS[name] for name in ("corrected", "spoiled", "changed", "wrong", "right")
    ]
    answers = [[seen["answer"] for seen in image["seen"]] for image in browser.data["images"]]
    names = {0: "airplane", 1: "automobile", 2: "bird"}
    expected = [(1, 0), (0, 1), (1, 2), (1, 1), (0, 0)]
    assert answers == [[names[a], names[b]] for a, b in expected]


def test_a_page_has_room_for_a_budget_of_images(tmp_path, make_run):
    rows = group_runs([read_run(make_run(tmp_path, "at", "at", 0, 30))])
    browser = make_browser(rows)
    assert (browser.shown, browser.stored) == (12, 12)
    assert make_browser(rows, budget=1).shown == 1
    some = make_browser(rows, budget=40_000)
    assert 1 < some.shown < 12
    assert some.data["images"] == browser.data["images"][: some.shown]


def test_the_share_of_a_map_inside_a_box():
    left = np.zeros((4, 4))
    left[:, 0] = 1
    box = np.array([0, 0, 8, 16])  # of an image of 16×16
    assert share_in_box(left, box, (16, 16)) == pytest.approx(1.0)
    assert share_in_box(np.ones((4, 4)), box, (16, 16)) == pytest.approx(0.5)
    # A quarter of each side, and half a pixel of the map.
    assert share_in_box(np.ones((2, 2)), np.array([0, 0, 4, 4]), (16, 16)) == pytest.approx(1 / 16)
    assert share_in_box(np.ones((2, 2)), np.zeros(4, int), (16, 16)) is None
    assert share_in_box(np.zeros((2, 2)), box, (16, 16)) == 0


def test_maps_of_two_sizes_differ_at_the_smaller_one(tmp_path, make_run):
    large = np.zeros((4, 4), np.float32)
    large[:2, :2] = 3.0
    np.testing.assert_allclose(pooled_map(large, 2, 2), [[1, 0], [0, 0]])
    colours = difference_colours(np.array([[-1.0, 0.0, 1.0]]), 1.0, 1, 3)
    blue, white, red = colours[0].astype(int)
    assert blue[2] > blue[0] and red[0] > red[2] and white.min() > 235


def test_the_difference_of_a_student_to_its_teacher(tmp_path, make_run):
    teacher, student = (
        make_run(tmp_path, kind, kind, 0, error) for kind, error in (("teacher", 22), ("at", 30))
    )
    for folder, place in ((teacher, 0), (student, 1)):
        with np.load(folder.maps_file) as file:
            arrays = dict(file)
        for s in range(3):
            arrays[f"map.{s}"] = np.zeros_like(arrays[f"map.{s}"])
            arrays[f"map.{s}"][:, 0, 0 if s == 0 else place] = 1.0
        np.savez(folder.maps_file, **arrays)
    browser = make_browser(group_runs([read_run(teacher), read_run(student)]))
    of_teacher, of_student = browser.data["images"][0]["seen"]
    assert "distance" not in of_teacher["stages"][0]
    distances = [stage["distance"] for stage in of_student["stages"]]
    assert distances == pytest.approx([0, math.sqrt(2), math.sqrt(2)])


def test_stages_meet_at_the_same_resolution():
    def maps(stages):
        images = np.zeros((1, 32, 32, 3), np.uint8)
        heat = [np.ones((1, size, size), np.float32) for size in stages.values()]
        return StoredMaps(images, ["cat"], ["cat"], np.zeros((1, 4)), list(stages), heat)

    wrn = maps({"group0": 32, "group1": 16, "group2": 8})
    resnet = maps({"stem": 16, "layer1": 16, "layer2": 8, "layer3": 4})
    assert [counterpart(wrn, stage, resnet) for stage in range(3)] == [None, 1, 2]
    assert [counterpart(resnet, stage, resnet) for stage in range(4)] == [0, 1, 2, 3]


def test_confusions_of_a_student_and_the_student_alone(tmp_path, make_run):
    alone, at = (make_run(tmp_path, name, name, 0, 30) for name in ("none", "at"))
    write_answers(alone, [0, 1, 1, 0, 2, 0])
    write_answers(at, [0, 0, 1, 0, 1, 0])
    rows = group_runs([read_run(alone), read_run(at)])
    (comparison,) = compare_confusions(rows)
    assert (comparison.reference, comparison.images) == ("the student alone", 6)
    assert (comparison.corrected, comparison.spoiled) == (1, 1)
    assert comparison.matrix == [[50, -50, 0], [0, 0, 0], [0, 50, -50]]
    changes = [(c.label, c.answer, c.before, c.after, c.points) for c in comparison.changes]
    assert changes == [("cat", "dog", 50, 0, "−50.0"), ("cow", "dog", 0, 50, "+50.0")]
    write_report([run for row in rows for run in row.runs], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "Of 6 validation images, AT is right on 1 where the student alone is wrong" in page


def test_confusions_without_a_student_alone_are_against_the_teacher(tmp_path, make_run):
    at = make_run(tmp_path, "at", "at", 0, 30)
    write_answers(at, [0, 0, 1, 1, 2, 0], teacher=[0, 0, 1, 1, 2, 2])
    (comparison,) = compare_confusions(group_runs([read_run(at)]))
    assert comparison.reference == "the teacher"
    assert (comparison.corrected, comparison.spoiled) == (0, 1)


def test_confusions_of_seeds_with_other_classes_are_left_out(tmp_path, make_run):
    runs = [make_run(tmp_path, name, "at", seed, 30) for seed, name in enumerate(("one", "two"))]
    for run in runs:
        write_answers(run, [0, 0, 1, 1, 2, 0], teacher=[0, 0, 1, 1, 2, 2])
    with np.load(runs[1].predictions_file) as file:
        arrays = dict(file) | {"classes": np.array([*CLASSES, "eel"])}
    np.savez(runs[1].predictions_file, **arrays)
    (comparison,) = compare_confusions(group_runs([read_run(run) for run in runs]))
    assert comparison.images == 6


def test_confusions_need_the_same_images(tmp_path, make_run):
    alone, at = (make_run(tmp_path, name, name, 0, 30) for name in ("none", "at"))
    write_answers(alone, [0, 0, 1, 1, 2, 2], labels=[0, 1, 0, 1, 2, 2])
    write_answers(at, [0, 0, 1, 1, 2, 2])
    assert compare_confusions(group_runs([read_run(alone), read_run(at)])) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("images", np.zeros((12, 32, 32), np.uint8), "images is an array of uint8 of the shape"),
        ("map.1", np.zeros((11, 8, 8), np.float32), r"map.1 .* expected numbers .*\(K, h, w\)"),
        ("map.0", np.zeros((12, 0, 8), np.float32), "map.0"),
        ("predictions", np.full(12, "cat"), "predictions .* expected whole numbers"),
        ("boxes", np.zeros((12, 4)), "boxes is an array of float64"),
    ],
)
def test_a_damaged_array_is_named(tmp_path, make_run, name, value, message):
    folder = make_run(tmp_path, "at", "at", 0, 30)
    with np.load(folder.maps_file) as file:
        arrays = dict(file)
    np.savez(folder.maps_file, **(arrays | {name: value}))
    with pytest.raises(UserError, match=f"maps.npz is damaged: {message}"):
        _ = read_run(folder).maps


def test_damaged_predictions_are_named(tmp_path, make_run):
    folder = make_run(tmp_path, "at", "at", 0, 30)
    write_answers(folder, [0, 0, 1, 1, 2, 3])
    expected = "student has values from 0 to 3, expected the numbers of 3 classes"
    with pytest.raises(UserError, match=f"predictions.npz is damaged: {expected}"):
        _ = read_run(folder).predictions
    folder.predictions_file.write_bytes(b"PK")
    with pytest.raises(UserError, match=r"predictions.npz cannot be read"):
        _ = read_run(folder).predictions


def test_settings_say_how_to_run_again(tmp_path, make_run):
    folder = make_run(tmp_path, "it's", "at", 0, 30)
    write_report([read_run(folder)], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    (command,) = re.findall(r"<pre[^>]*>(attention-transfer distill --config [^<]*)</pre>", page)
    words = shlex.split(html.unescape(command))
    assert words[3] == str(folder.config_file)
    assert words[4:] == ["--out", f"{folder.path}-again"]
