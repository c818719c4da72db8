"""Rewrites the tables of README, docs/ and results/ from the summaries of runs.

    python bench/results_tables.py                       all pages
    python bench/results_tables.py --from RUN... --json results/NAME.jsonl --title TITLE

The comment before a table names files of summaries (`studies/summaries.py`):

    <!-- table: results/demo.jsonl -->
    <!-- table: results/demo.jsonl: mean | in box % = on the digit -->

or, for columns of several files side by side, a line for each file. COLUMN = HEADER replaces a
header; without columns, those of the file are used. A line `stack: COLUMN | COLUMN` puts the files
one below the other, each under its title, and `only: SETTING | SETTING` chooses settings. A line
`cost: FILE` or `ratios: FILE` gives a table of `study cost`, and `best of sweep: FILE | FILE`
compares `auto` with the best β of the sweep in each file. Sentences around the tables are kept.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from table_files import joined_table, read_table_data

from attention_transfer.errors import UserError
from attention_transfer.report import group_runs, read_run
from attention_transfer.report.formats import signed
from attention_transfer.run_folder import find_runs, replacing
from attention_transfer.studies.cost import cost_table, ratio_table
from attention_transfer.studies.render import REPRODUCTION, TextTable, text_table
from attention_transfer.studies.summaries import (
    Cell,
    TableData,
    merge_lines,
    summarize,
    write_table_data,
)

ROOT = Path(__file__).parents[1]
MARKER = re.compile(r"^<!-- table:(?P<files>(?s:.*?))-->\n+(?P<table>(?:\|.*\n)*)", re.MULTILINE)
Columns = list[tuple[str, str | None]]
# Constant weights of a sweep; fewer than three are not a sweep.
SWEPT = re.compile(r"(authors|caffe), β = \d+")
FEWEST_SWEPT = 3
COSTS = {"cost": cost_table, "ratios": ratio_table}


def pages(root: Path = ROOT) -> list[Path]:
    """The pages that may hold tables."""
    found = [root / "README.md"]
    for folder in ("docs", "results"):
        found += sorted((root / folder).rglob("*.md"))
    return [page for page in found if page.is_file()]


def rewrite(page: str, root: Path = ROOT) -> str:
    """The page with rewritten tables; the names of its files are relative to `root`.

    Raises:
        UserError: for a file that cannot be read, and an unknown column.
    """

    def table(match: re.Match[str]) -> str:
        marker = f"<!-- table:{match['files']}-->"
        written = f"{marker}\n\n{table_of(match['files'], root)}\n"
        if not match["table"] and match.end() < len(page):
            written += "\n"  # the match took the blank line before the text
        return written

    return MARKER.sub(table, page)


def table_of(text: str, root: Path) -> str:
    """The table of a marker, as Markdown."""
    parts, words = [], {}
    for line in text.strip().splitlines():
        name, _, columns = line.partition(":")
        if name in COSTS:
            lines = (root / columns.strip()).read_text().splitlines()[1:]
            return COSTS[name]([json.loads(line) for line in lines]).markdown()
        if name == "best of sweep":
            files = [root / file.strip() for file in columns.split("|")]
            return best_of_sweep([read_table_data(file) for file in files]).markdown()
        if name in ("stack", "only"):
            words[name] = [word.strip() for word in columns.split("|")]
        else:
            parts.append((read_table_data(root / name.strip()), parse_columns(columns)))
    if "stack" in words:
        tables = [table for table, _ in parts]
        return text_table(stacked(tables, words.get("only")), words["stack"]).markdown()
    if "only" in words:
        parts = [(stacked([table], words["only"], row=""), columns) for table, columns in parts]
    (data, columns), *others = parts
    if columns or others:
        return joined_table(parts).markdown()
    return text_table(data, data.head.get("columns", REPRODUCTION)).markdown()


def best_of_sweep(tables: Sequence[TableData]) -> TextTable:
    """A row for each table that has a sweep, and the mean difference; all of seed 0."""
    headers = ["", "student alone", "auto", "best of the sweep", "its β", "auto − best", "β tried"]
    rows, differences = [], []
    for table in tables:
        errors = {cell.setting: cell.values("error").get(0) for cell in table.cells}
        swept = {name: errors[name] for name in errors if SWEPT.fullmatch(name)}
        if len(swept) < FEWEST_SWEPT:
            continue
        best = min(swept, key=lambda name: swept[name])
        differences.append(errors["auto"] - swept[best])
        numbers = [errors["student alone"], errors["auto"], swept[best]]
        row = [table.title, *(f"{number:.2f}" for number in numbers)]
        rows.append([*row, best, signed(differences[-1], 2), str(len(swept))])
    mean = sum(differences) / len(differences)
    rows.append(["mean", *["–"] * 4, signed(mean, 2), "–"])
    return TextTable(headers, rows)


def stacked(
    tables: Sequence[TableData], only: Sequence[str] | None, row: str | None = None
) -> TableData:
    """Stacks tables; `only` selects and orders settings. The rows are their titles, or `row`."""
    cells = []
    for table in tables:
        names = only or [cell.setting for cell in table.cells]
        found = (cell for name in names for cell in table.cells if cell.setting == name)
        cells += [replace(cell, row=table.title if row is None else row) for cell in found]
    return TableData({}, cells)


def parse_columns(text: str) -> Columns:
    """`mean = error | seeds` -> [("mean", "error"), ("seeds", None)]"""
    columns: Columns = []
    for part in filter(None, (word.strip() for word in text.split("|"))):
        name, _, header = part.partition("=")
        columns.append((name.strip(), header.strip() or None))
    return columns


def collect(folders: list[Path], title: str, columns: list[str]) -> TableData:
    """The finished runs of folders as a table: a setting for each row that `compare` prints."""
    rows = group_runs([read_run(folder) for folder in find_runs(list(folders))])
    cells = []
    for row in rows:
        runs = find_runs([run.folder for run in row.runs])
        name = row.label
        if row.differences and not row.named:
            # The differences in the place of the letter that tells the rows apart.
            name = f"{name.rpartition(' ')[0]}, {row.difference_text}"
        cells.append(Cell("", name, merge_lines(summarize(folder) for folder in runs)))
    head: dict[str, Any] = {"title": title}
    if columns:
        head["columns"] = columns
    return TableData(head, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--from", dest="runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--json", type=Path, help="the file of summaries to write from them")
    parser.add_argument("--title", default="", help="title of the table")
    parser.add_argument("--columns", default="", help="columns of the page: seeds|mean|each")
    given = parser.parse_args()
    try:
        if given.runs:
            if given.json is None:
                raise UserError("--from needs --json: name the file to write")
            columns = [name for name, _ in parse_columns(given.columns)]
            title = given.title or given.json.stem
            write_table_data(given.json, collect(given.runs, title, columns))
        for page in pages():
            before = page.read_text()
            after = rewrite(before)
            if after != before:
                with replacing(page) as partial:
                    partial.write_text(after)
                print(page.relative_to(ROOT))
    except (UserError, OSError) as error:
        print(f"results_tables.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
