"""The tables of the pages are those of the runs' summaries beside them."""

from __future__ import annotations

import json
import re

import pytest
import results_tables
from test_lab_tables import ROOT

from attention_transfer.errors import UserError

LINES = [
    {"title": "Mine", "columns": ["seeds", "mean", "each", "paper"]},
    {"setting": "alone", "published": {"error": 9.5}, "confirmed": False},
    {"setting": "alone", "seed": 0, "error": 10.0},
    {"setting": "alone", "seed": 1, "error": 11.0},
    {"setting": "AT", "means": {"in_box": 50.0}},
    {"setting": "AT", "seed": 0, "error": 8.0},
]
PAGE = """before

<!-- table: mine.jsonl -->
| old | table |
|---|---|
| x | y |

after | no table
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path


def test_a_table_is_written_from_its_file(folder):
    page = results_tables.rewrite(PAGE, folder)
    assert page.splitlines() == [
        "before",
        "",
        "<!-- table: mine.jsonl -->",
        "",
        "| | seeds | error % | each seed | paper |",
        "|---|---|---|---|---|",
        "| alone | 2 | 10.50 ± 0.71 | 10.00, 11.00 | 9.5† |",
        "| AT | 1 | 8.00 | 8.00 | – |",
        "",
        "after | no table",
    ]
    assert results_tables.rewrite(page, folder) == page


def test_tables_stand_side_by_side_with_headers_of_their_own(folder):
    marker = (
        "<!-- table:\nmine.jsonl: mean = [one](x.md) | seeds\nmine.jsonl: in box % = on it\n-->\n"
    )
    lines = results_tables.rewrite(marker, folder).splitlines()
    assert lines[-4:] == [
        "| | [one](x.md) | seeds | on it |",
        "|---|---|---|---|",
        "| alone | 10.50 ± 0.71 | 2 | – |",
        "| AT | 8.00 | 1 | 50.0 % |",
    ]


def test_tables_stand_one_below_the_other_under_their_titles(folder):
    lines = [{"title": "Yours"}, {"setting": "AT, β = 3", "seed": 0, "error": 7.0}]
    (folder / "yours.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    marker = "<!-- table:\nstack: mean\nonly: AT, β = 3 | AT\nmine.jsonl\nyours.jsonl\n-->\n\n"
    rows = results_tables.rewrite(marker, folder).splitlines()[-2:]
    assert rows == ["| Mine | AT | 8.00 |", "| Yours | AT, β = 3 | 7.00 |"]


def test_a_first_table_leaves_a_line_before_the_text(folder):
    lines = results_tables.rewrite("<!-- table: mine.jsonl -->\n\nafter\n", folder).splitlines()
    assert lines[-2:] == ["", "after"]


def test_auto_stands_against_the_best_of_each_sweep(folder):
    errors = {"student alone": 20.0, "auto": 9.0, "authors, β = 100": 11.0}
    errors |= {"caffe, β = 1": 8.0, "caffe, β = 3": 8.5, "caffe, β = 3, linear": 1.0}
    lines = [{"setting": name, "seed": 0, "error": error} for name, error in errors.items()]
    lines += [{"setting": "caffe, β = 1", "seed": 1, "error": 1.0}]  # seed 0 alone is compared
    for name in ("one", "other"):
        text = "".join(json.dumps(line) + "\n" for line in [{"title": name}, *lines])
        (folder / f"{name}.jsonl").write_text(text)
        lines[1]["error"] = 7.0
    marker = "<!-- table: best of sweep: one.jsonl | other.jsonl | mine.jsonl -->\n"
    rows = results_tables.rewrite(marker, folder).splitlines()[-3:]
    assert rows == [
        "| one | 20.00 | 9.00 | 8.00 | caffe, β = 1 | +1.00 | 3 |",
        "| other | 20.00 | 7.00 | 8.00 | caffe, β = 1 | −1.00 | 3 |",
        "| mean | – | – | – | – | 0.00 | – |",
    ]


@pytest.mark.parametrize(
    ("marker", "words"),
    [
        ("<!-- table: none.jsonl -->\n", "cannot read"),
        ("<!-- table: mine.jsonl: maen -->\n", "unknown column 'maen'.*did you mean mean"),
    ],
)
def test_errors_name_the_file_or_the_column(folder, marker, words):
    with pytest.raises(UserError, match=words):
        results_tables.rewrite(marker, folder)


def test_every_page_agrees_with_its_files():
    used = set()
    for page in results_tables.pages(ROOT):
        text = page.read_text()
        assert results_tables.rewrite(text, ROOT) == text, page
        for match in results_tables.MARKER.finditer(text):
            used |= set(re.findall(r"results/\S+\.jsonl", match["files"]))
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "results").rglob("*.jsonl")}
    assert used == files
    assert len(files) >= 4


def test_runs_become_a_table(student_run, teacher_run, tmp_path):
    table = results_tables.collect([student_run, teacher_run], "Two", ["mean"])
    assert {cell.setting for cell in table.cells} == {"AT+KD", "WRN-10-1 teacher"}
    assert all(len(cell.runs) == 1 for cell in table.cells)
    assert str(student_run) not in str(table)
