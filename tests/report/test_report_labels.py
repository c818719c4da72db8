"""How rows are named, and that all is named in which they differ."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from attention_transfer.config import Recipe
from attention_transfer.options import option_specs
from attention_transfer.report import group_runs, print_table, read_run, write_report
from attention_transfer.report.settings import PER_RUN_OPTIONS

MANY = [
    {"beta": 100.0, "convention": "authors", "kind": "sum", "p": 2.0},
    {"beta": 1000.0, "convention": "authors", "kind": "sum", "p": 2.0},
    {"beta": 100.0, "convention": "paper", "kind": "sum", "p": 2.0},
    {"beta": 100.0, "convention": "paper", "kind": "max", "p": 2.0},
    {"beta": 100.0, "convention": "paper", "kind": "max", "p": 1.0},
]


@pytest.fixture
def printed():
    def print_rows(rows, width):
        out = io.StringIO()
        print_table(rows, Console(file=out, width=width))
        return out.getvalue()

    return print_rows


@pytest.fixture
def many(tmp_path, make_run):
    """Five settings of `at` that differ in four options."""
    return [read_run(make_run(tmp_path, f"at-{i}", "at", 0, 30, **o)) for i, o in enumerate(MANY)]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_all_that_differs_is_named(many, printed, width):
    rows = group_runs(many)
    assert [row.label for row in rows] == ["AT a", "AT b", "AT c", "AT d", "AT e"]
    text = printed(rows, width)
    assert "…" not in text
    assert "(2)" not in text
    table = text[: text.index("AT a: ")]
    for row, options in zip(rows, MANY, strict=True):
        shown = " ".join(line for line in table.splitlines() if line.strip().startswith(row.label))
        words = shown.split()
        for value in options.values():
            assert (f"{value:g}" if isinstance(value, float) else value) in words
    assert max(map(len, table.splitlines())) <= width


def test_the_page_names_all_that_differs(many, tmp_path):
    write_report(many, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "What differs" in page
    assert "beta=100, convention=paper, kind=max, p=1" in page


def test_options_that_differ_between_methods_are_named(tmp_path, make_run, printed):
    runs = [
        read_run(make_run(tmp_path, method, method, 0, 30, lr=lr))
        for method, lr in (("at", 0.1), ("kd", 0.05))
    ]
    rows = group_runs(runs)
    assert [row.label for row in rows] == ["AT", "KD"]
    text = printed(rows, 100)
    assert "lr" in text
    assert "0.05" in text


def test_an_option_that_a_method_does_not_read_is_no_difference(tmp_path, make_run, printed):
    runs = [
        read_run(make_run(tmp_path, "at", "at", 0, 30, beta=100.0)),
        read_run(make_run(tmp_path, "kd", "kd", 0, 30, beta=None)),
    ]
    assert "β" not in printed(group_runs(runs), 200)


def test_two_teachers_of_one_network_are_told_apart(tmp_path, make_run):
    runs = [
        read_run(make_run(tmp_path, f"from-{name}", "at", 0, 30, teacher=f"runs/{name}"))
        for name in ("a", "b")
    ]
    assert [row.label for row in group_runs(runs)] == ["AT from runs/a", "AT from runs/b"]


def test_numbers_that_agree_in_six_digits_are_told_apart(tmp_path, make_run):
    runs = [read_run(make_run(tmp_path, f"lr-{lr}", "at", 0, 30, lr=lr)) for lr in (0.1, 0.1000001)]
    assert [row.label for row in group_runs(runs)] == ["AT lr=0.1", "AT lr=0.1000001"]


def test_an_old_folder_without_an_option_has_its_default(tmp_path, make_run):
    new = read_run(make_run(tmp_path, "new", "at", 0, 30, p=2.0, momentum=0.9))
    assert len(group_runs([new, read_run(make_run(tmp_path, "old", "at", 1, 30))])) == 1


def test_options_that_change_no_numbers_split_no_row(tmp_path, make_run):
    declared = {key for key, spec in option_specs(Recipe).items() if not spec.changes_numbers}
    assert declared | {"seed"} <= set(PER_RUN_OPTIONS)
    runs = [
        read_run(make_run(tmp_path, "a", "at", 0, 30, stream="on", on_bad_image="skip")),
        read_run(make_run(tmp_path, "b", "at", 1, 30, stream="off", precision="bf16")),
    ]
    assert len(group_runs(runs)) == 1


def test_a_long_name_is_not_cut_at_80_columns(tmp_path, make_run, printed):
    model = "timm/convnextv2_nano.fcmae_ft_in22k_in1k_384:pretrained"
    runs = [
        read_run(make_run(tmp_path, name, name, 0, 30, model=model)) for name in ("at", "at+kd")
    ]
    rows = group_runs(runs)
    text = printed(rows, 80)
    assert "…" not in text
    words = "".join(text.split())
    assert model in words or model[:40] in words


def test_a_teacher_of_the_same_network_and_budget_is_the_baseline(tmp_path, make_run):
    teacher = {"command": "train", "teacher": None, "method": None}
    folder = make_run(tmp_path, "alone", "none", 0, 34, **teacher)
    at = read_run(make_run(tmp_path, "at", "at", 0, 30, teacher=str(folder)))
    rows = group_runs([at, read_run(folder)])
    assert [row.label for row in rows] == ["WRN-16-1 teacher", "AT"]
    assert rows[1].delta == pytest.approx(-4.0)
    other = read_run(make_run(tmp_path, "long", "none", 0, 33, epochs=100, **teacher))
    at = read_run(make_run(tmp_path, "at-2", "at", 0, 30, teacher=str(other.folder)))
    assert group_runs([at, other])[1].delta is None
