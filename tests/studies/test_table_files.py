"""The paper's tables as files: their figures, their rows, and what is wrong with a user's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attention_transfer.config import make_recipe, named_recipe
from attention_transfer.errors import UserError
from attention_transfer.studies.options import TABLES
from attention_transfer.studies.table_file import chosen_rows, parse_table, read_table

METHOD = Path(__file__).parents[3] / "shared" / "METHOD.md"
TINY = {
    "title": "Tiny",
    "settings": {"student alone": {"method": "none"}, "KD": {"method": "kd"}},
    "rows": [{"student": "wrn-10-1", "teacher": "wrn-16-1"}],
}


def published(table: str) -> dict[str, dict[str, object]]:
    return {row.pair: row.published for row in read_table(table).rows}


@pytest.mark.parametrize("name", TABLES)
def test_every_setting_is_a_recipe(name):
    table = read_table(name)
    for row in table.rows:
        assert row.published, row.key
        for options in table.settings.values():
            teacher = (
                {} if options["method"] in ("none", "min-l2", "symmetry") else {"teacher": "t"}
            )
            make_recipe(
                named_recipe(table.recipe), table.options, row.options, options,
                {"model": row.student, "command": "distill", **teacher},
            )  # fmt: skip


def test_table_1_has_the_papers_figures():
    figures = published("table1")
    assert figures["nin-wide:nin-thin"] == {
        "student alone": 9.38, "AT": 8.93, "F-ActT": 9.05, "KD": 8.55, "AT+KD": 8.33,
        "teacher": 7.28,
    }  # fmt: skip
    assert figures["wrn-16-2:wrn-16-1"]["AT+KD"] == 7.51
    assert figures["wrn-40-1:wrn-16-1"]["AT"] == 8.25
    assert figures["wrn-40-2:wrn-16-2"]["teacher"] == 5.23


@pytest.mark.skipif(not METHOD.is_file(), reason="../shared/METHOD.md is not here")
def test_tables_agree_with_the_page_on_the_method():
    text = METHOD.read_text()
    rows = re.findall(r"^\| (?:NIN|WRN)-\S+ [^|]+ \| [^|]+ \|(.*\d) \|$", text, re.MULTILINE)
    theirs = [[float(x) for x in numbers.split("|")] for numbers in rows]
    ours = [[*row.published.values()] for row in read_table("table1").rows]
    assert ours == theirs
    line = next(line for line in text.splitlines() if line.startswith("Table 2"))
    for setting, figure in read_table("table2").rows[0].published.items():
        assert re.search(rf"{setting.replace('student alone', 'none')} {figure}\b", line), setting
    line = text[text.index("Table 3, NIN") : text.index("Table 4, ImageNet")]
    for setting, figure in read_table("table3").rows[0].published.items():
        name = setting.replace("student alone", "alone")
        assert re.search(rf"{name} {figure}\b", " ".join(line.split())), setting


def test_what_is_not_checked_is_not_confirmed():
    rows = {row.pair: row for row in read_table("table1").rows}
    assert rows["nin-wide:nin-thin"].confirmed == []
    assert rows["wrn-16-2:wrn-16-1"].confirmed == ["student alone", "AT", "teacher"]
    assert "F-ActT" not in rows["wrn-40-1:wrn-16-1"].confirmed
    assert read_table("table3").rows[0].confirmed == []


def test_rows_are_chosen_by_their_pair_or_name():
    table = read_table("table1")
    assert [row.student for row in chosen_rows(table, ["wrn-16-2:wrn-16-1"])] == ["wrn-16-1"]
    assert len(chosen_rows(table, [])) == 4
    with pytest.raises(UserError, match="did you mean wrn-16-2:wrn-16-1"):
        chosen_rows(table, ["wrn-16-2:wrn-16-l"])
    assert [row.key for row in chosen_rows(read_table("table4"), ["cub"])] == ["cub"]


def test_an_unknown_table_names_the_nearest():
    with pytest.raises(UserError, match="did you mean table1"):
        read_table("tabel1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"setings": {}}, "did you mean settings"),
        ({"rows": [{"teacher": "wrn-16-1"}]}, "rows.0.student"),
        ({"metrics": ["loss"]}, "metrics"),
        (
            {"rows": [{"student": "a", "published": {"DK": 1.0}}]},
            "unknown setting of mine, row None:a, 'DK'",
        ),
        ({"options": {"method": "at"}}, "options has method: expected it in settings"),
        ({"settings": {"teacher": {}}}, "mine: a setting is called teacher"),
        ({"settings": {"KD": {"teacher": "zoo:x"}}}, "KD has teacher: expected it in rows"),
        ({"settings": {"KD": {"trust-code": True}}}, "expected it as the flag --trust-code"),
        ({"teacher_options": {"trust_code": True}}, "expected it as the flag --trust-code"),
        ({"settings": {"KD": {"method": False}}}, "KD has method False: expected methods"),
        ({"rows": [{"student": "a"}, {"student": "a"}]}, "two rows are None:a"),
    ],
)
def test_errors_in_a_file_name_the_place(change, words):
    with pytest.raises(UserError, match=re.escape(words)):
        parse_table(TINY | change, "mine")
