"""Grouping, labels, spreads and differences, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from attention_transfer.errors import UserError
from attention_transfer.report import group_runs, read_run
from attention_transfer.report.curves import series
from attention_transfer.report.formats import count, minutes, rate, short_label, signed
from attention_transfer.report.load_run import LoadedRun
from attention_transfer.report.summary_text import caveats, headline, sentence, title
from attention_transfer.report.teachers import with_teachers
from attention_transfer.run_folder import RunFolder


def row_of(runs: list[LoadedRun], label: str):
    return next(row for row in group_runs(runs) if row.label == label)


def test_seeds_make_one_row_teacher_first_then_alone(runs):
    rows = group_runs(runs)
    assert [row.label for row in rows] == ["WRN-16-2 teacher", "student alone", "AT", "KD", "AT+KD"]
    assert [row.role for row in rows] == ["teacher", "alone", "student", "student", "student"]
    assert all(len(row.runs) == 2 for row in rows)
    assert title(rows) == "WRN-16-2 → WRN-16-1 on cifar10"


def test_a_folder_named_twice_counts_once(runs):
    assert all(len(row.runs) == 2 for row in group_runs([*runs, *runs]))


def test_the_seed_in_the_teachers_path_does_not_split_a_row(tmp_path, make_run):
    runs = [
        read_run(
            make_run(
                tmp_path, "at", "at", seed, 30, teacher=str(tmp_path / "teacher" / f"seed-{seed}")
            )
        )
        for seed in (0, 1)
    ]
    assert len(group_runs(runs)) == 1


def test_mean_sample_deviation_and_median(tmp_path, make_run):
    runs = [
        read_run(make_run(tmp_path, "at", "at", seed, error))
        for seed, error in enumerate((8.0, 9.0, 13.0))
    ]
    error = group_runs(runs)[0].error
    assert error is not None
    assert error.n == 3
    assert error.mean == pytest.approx(10.0)
    assert error.sd == pytest.approx(7.0**0.5)  # ((2² + 1² + 3²) / 2)^½
    assert error.median == pytest.approx(9.0)
    assert (error.low, error.high) == (pytest.approx(8.0), pytest.approx(13.0))
    assert group_runs(runs[:1])[0].error.sd is None


def test_delta_is_negative_where_the_method_helps(runs):
    assert row_of(runs, "AT+KD").delta == pytest.approx(25.7 - 34.6)
    assert row_of(runs, "student alone").delta is None
    assert row_of(runs, "WRN-16-2 teacher").delta is None


def test_a_sentence_states_direction_and_overlap(tmp_path, runs, make_run):
    expected = (
        "AT+KD: 25.7 % error, 8.9 points below the student alone "
        "(2 seeds; the ranges do not overlap)"
    )
    assert sentence(row_of(runs, "AT+KD")) == expected
    more = [
        read_run(make_run(tmp_path, "symmetry", "symmetry", s, e))
        for s, e in enumerate((34.8, 36.0))
    ]
    alone = [run for run in runs if run.config["method"] == "none"]
    worse = sentence(row_of([*alone, *more], "symmetry"))
    assert worse == (
        "symmetry: 35.4 % error, 0.8 points above the student alone (2 seeds; the ranges overlap)"
    )
    single = sentence(row_of([*alone, more[0]], "symmetry"))
    assert single.endswith(
        "0.2 points above the student alone (1 seed against 2; too few to know the spread)"
    )


def test_a_student_alone_with_another_budget_is_no_baseline(tmp_path, make_run):
    alone = read_run(make_run(tmp_path, "alone", "none", 0, 34, epochs=100))
    rows = group_runs([alone, read_run(make_run(tmp_path, "at", "at", 0, 30))])
    assert rows[1].delta is None
    assert any("budget" in line for line in caveats(rows))


def test_a_network_trained_alone_serves_as_baseline(tmp_path, make_run):
    config = {"command": "train", "teacher": None, "method": None}
    alone = read_run(make_run(tmp_path, "alone", "none", 0, 34, **config))
    rows = group_runs([read_run(make_run(tmp_path, "at", "at", 0, 30)), alone])
    assert [row.label for row in rows] == ["WRN-16-1 alone", "AT"]
    assert rows[1].delta == pytest.approx(-4.0)


def test_equal_labels_are_told_apart_by_what_differs(tmp_path, make_run):
    runs = [
        read_run(make_run(tmp_path, f"at-{beta:g}", "at", 0, 30, beta=beta))
        for beta in (100.0, 1000.0)
    ]
    assert [row.label for row in group_runs(runs)] == ["AT β=100", "AT β=1000"]
    runs.append(read_run(make_run(tmp_path, "other", "at", 0, 31, model="wrn-40-1", beta=100.0)))
    assert [row.label for row in group_runs(runs)] == [
        "AT WRN-16-1 β=100",
        "AT WRN-16-1 β=1000",
        "AT WRN-40-1 β=100",
    ]


def test_cost_is_compared_with_the_teacher_of_the_same_run(runs):
    row = row_of(runs, "AT")
    assert row.times_teacher("parameters") == pytest.approx(175_066 / 691_674)
    assert row.times_teacher("inference", "images_per_second") == pytest.approx(4800 / 1900)
    assert list(row.in_box().items())[-1] == ("group3", pytest.approx(0.7 - 0.315))


def test_a_run_with_only_a_config_is_unfinished(tmp_path):
    folder = RunFolder(tmp_path / "bare")
    folder.path.mkdir()
    folder.config_file.write_text("command: train\nmodel: wrn-16-1\n")
    run = read_run(folder)
    rows = group_runs([run])
    assert not run.finished
    assert run.maps is None
    assert rows[0].error is None
    assert sentence(rows[0]) == "WRN-16-1 alone: unfinished"


def test_unfinished_seeds_stay_out_of_the_numbers(tmp_path, make_run):
    runs = [read_run(make_run(tmp_path, "at", "at", s, 30, finished=s == 0)) for s in (0, 1)]
    row = group_runs(runs)[0]
    assert row.error.n == 1
    assert caveats([row]) == ["AT: 1 of 2 seeds unfinished and not included in its numbers."]


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "environment.json"])
def test_a_broken_file_is_named_in_one_line(tmp_path, name, make_run):
    folder = make_run(tmp_path, "at", "at", 0, 30)
    (folder.path / name).write_text("{ not: [this")
    with pytest.raises(UserError, match=name) as caught:
        read_run(folder)
    assert "\n" not in str(caught.value)


def test_metrics_that_are_no_text_are_named(tmp_path, make_run):
    folder = make_run(tmp_path, "at", "at", 0, 30)
    folder.metrics_file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read"):
        read_run(folder)


def test_broken_maps_are_named_when_they_are_read(tmp_path, make_run):
    run = read_run(make_run(tmp_path, "at", "at", 0, 30))
    (run.folder / "maps.npz").write_bytes(b"not a zip")
    with pytest.raises(UserError, match=r"maps\.npz"):
        _ = run.maps


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("images", np.zeros((12, 8, 8, 3), np.float32)),
        ("map.0", np.zeros((12, 8, 8), np.int64)),
        ("boxes", np.full((12, 4), np.nan)),
        ("labels", np.zeros(3, np.int64)),
        ("labels", np.zeros((12, 1), np.int64)),
        ("predictions", np.array(["a"] * 12)),
        ("classes", np.arange(12)),
    ],
)
def test_arrays_that_no_run_stores_are_named(tmp_path, make_run, name, array):
    run = read_run(make_run(tmp_path, "at", "at", 0, 30))
    file = run.folder / "maps.npz"
    with np.load(file) as arrays:
        stored = dict(arrays)
    np.savez(file, **(stored | {name: array}))
    with pytest.raises(
        UserError, match=rf"maps\.npz is damaged: {name} is an array of {array.dtype}"
    ):
        _ = run.maps


def test_series_holds_mean_and_range_over_seeds():
    first = [
        {"epoch": 1, "val_loss": 5.0},
        {"epoch": 2, "val_loss": 1.0},
        {"epoch": 3, "val_loss": float("nan")},
    ]
    second = [{"epoch": 1}, {"epoch": 2, "val_loss": 3.0}, {"epoch": 3, "val_loss": None}]
    line = series(
        [LoadedRun(Path("a"), {}, first), LoadedRun(Path("b"), {}, second)],
        "val_loss",
    )
    assert (line.epochs, line.mean, line.low, line.high) == (
        [1, 2],
        [5.0, 2.0],
        [5.0, 1.0],
        [5.0, 3.0],
    )


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("student alone", "student alone"),
        ("resnet64.py:resnet34 teacher", "resnet34 teacher"),
        ("timm/mobilenetv3_small_075 teacher", "mobilenetv3_small_0…"),
        ("AT+KD, β=100", "AT+KD, β=100"),
    ],
)
def test_labels_fit_the_margin_of_a_plot(label, expected):
    assert short_label(label) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count(999), "999"),
        (count(41_234), "41.2 k"),
        (count(175_066), "0.18 M"),
        (count(1.234e9), "1.23 G"),
        (rate(3.21), "3.2"),
        (rate(350.4), "350"),
        (rate(25_340), "25.3 k"),
        (minutes(3), "0.05"),
        (minutes(66), "1.1"),
        (minutes(7440), "124"),
        (signed(-8.94, 1), "−8.9"),
        (signed(0.3, 1), "+0.3"),
        (signed(-0.04, 1), "0.0"),
    ],
)
def test_numbers_are_short(text, expected):
    assert text == expected


def test_the_headline_says_what_the_best_student_keeps(runs, tmp_path, make_run):
    rows = with_teachers(group_runs(runs))
    assert headline(rows) == (
        "The best of 3 students (AT+KD) keeps 96 % of the teacher's accuracy at 2.5 × its speed "
        "and with 25 % of its parameters. Its error is 8.9 points below that of the student alone."
    )
    one = read_run(make_run(tmp_path, "at", "at", 0, 30))
    del one.summary["teacher"]["inference"]
    kept = "keeps 90 % of the teacher's accuracy with 25 % of its parameters"
    assert headline(with_teachers(group_runs([one]))) == f"The student trained by AT {kept}."
    one.summary["teacher"] = None
    assert headline(group_runs([one])) == "The student trained by AT has 30.0 % error."
    assert headline(group_runs([read_run(make_run(tmp_path, "a", "none", 0, 30))])) == ""


def test_the_headline_prefers_speeds_that_were_measured_side_by_side(tmp_path, make_run):
    runs = [read_run(make_run(tmp_path, kind, kind, 0, 30)) for kind in ("teacher", "at")]
    for run, median in zip(runs, (1000.0, 3900.0), strict=True):
        run.speed = {"images_per_second": {"median": median, "low": 1.0, "high": 1.0}}
    assert "at 3.9 × its speed" in headline(with_teachers(group_runs(runs)))
