"""The tables on the pages of results agree with the JSON files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tables

from attention_transfer.errors import UserError

ROOT = Path(__file__).parents[3]
PAGE = """# Speed

before

`attention-transfer bench step --rounds 1 --json r.json` · some day

![a picture](x.png)

| old |
|---|
| 1 |

after 1.00
"""


def write(folder, **more):
    rows = [
        {"name": "authors", "median": 1234.5, "p10": 1000.0, "p90": 1500.0, "times_authors": 1.0},
        {
            "name": "ours",
            "median": 2469.0,
            "p10": 2.0,
            "p90": 3.0,
            "times_authors": 2.0,
            "share": 0.0123,
            "axis": "x",
        },
    ]
    result = {
        "date": "2026-01-02",
        "commit": "abc",
        "command": ["attention-transfer", "bench", "step", "--rounds", "3", "--json", "r.json"],
        "settings": {"rounds": 3},
        "hardware": {"cpu": "some CPU", "cores": 4, "gpu": None},
        "versions": {"torch": "2.99"},
        "rows": rows,
    }
    (folder / "r.json").write_text(json.dumps(result | more))


def test_the_table_and_its_line_are_written_again(tmp_path):
    write(tmp_path)
    assert tables.rewrite(PAGE, tmp_path).splitlines()[4:] == [
        "`attention-transfer bench step --rounds 3 --json r.json` · 2026-01-02 · commit abc · "
        "3 rounds · 4 cores of some CPU, torch 2.99",
        "",
        "![a picture](x.png)",
        "",
        "|  | images/s | p10 | p90 | × authors | share |",
        "|---|---|---|---|---|---|",
        "| authors | 1,234 | 1,000 | 1,500 | 1.00 |  |",
        "| ours | 2,469 | 2 | 3 | 2.00 | 1.2% |",
        "",
        "after 1.00",
    ]
    assert tables.rewrite(PAGE, tmp_path).splitlines()[:4] == PAGE.splitlines()[:4]


def test_the_command_rewrites_a_file(tmp_path, monkeypatch):
    write(tmp_path, hardware={"cpu": "c", "cores": 1, "gpu": "some GPU"}, settings={"rounds": 1})
    (tmp_path / "page.md").write_text(PAGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["tables", "page.md"])
    tables.main()
    assert "1 round · some GPU, torch 2.99\n" in (tmp_path / "page.md").read_text()


def test_the_command_of_a_script():
    result = {
        "date": "2026-01-02",
        "commit": "abc",
        "command": ["sweep.py", "--json", "r.json"],
        "settings": {"rounds": 1},
        "hardware": {"cpu": "c", "cores": 1, "gpu": None},
        "versions": {"torch": "2.99"},
    }
    line = tables.heading(result)
    assert line.startswith("`python bench/sweep.py --json r.json` · ") and tables.LINE.match(line)
    result["command"] = ["__main__.py", "bench", "step", "--json", "r.json"]
    assert tables.heading(result).startswith("`attention-transfer bench step --json r.json` · ")


@pytest.mark.parametrize(
    ("page", "content", "message"),
    [
        (PAGE, None, "cannot read .*r.json"),
        (PAGE, "no JSON", "cannot read .*r.json"),
        (PAGE, "{}", "holds no bench"),
        (PAGE.replace("|", ""), "", "no table follows .*bench step"),
    ],
)
def test_errors_name_the_file_or_the_line(tmp_path, page, content, message):
    if content == "":
        write(tmp_path)
    elif content is not None:
        (tmp_path / "r.json").write_text(content)
    with pytest.raises(UserError, match=message):
        tables.rewrite(page, tmp_path)


@pytest.mark.parametrize("name", ["bench.md", "gradient.md", "teach-once.md"])
def test_the_pages_agree_with_the_files(name):
    page = (ROOT / "results" / name).read_text()
    assert page.count("--json results/bench/") >= 1
    assert tables.rewrite(page, ROOT) == page
