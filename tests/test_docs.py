"""The documents: their examples run, their links lead somewhere, their commands and flags exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import Net, batch

from attention_transfer.commands import COMMANDS
from attention_transfer.methods.registry import METHODS

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [*sorted(ROOT.glob("*.md")), *PAGES, *sorted((ROOT / "results").glob("*.md"))]
RECIPES = sorted((ROOT / "src/attention_transfer/recipes").glob("*.yaml"))
COMMAND = r"(?:attention-transfer|-m attention_transfer) +([a-z]+)([^`\n]*)"


def examples() -> list[Any]:
    """The Python code of the pages that users read."""
    params = []
    for page in [ROOT / "README.md", *PAGES]:
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        params += [pytest.param(code, id=f"{page.name}-{j}") for j, code in enumerate(blocks)]
    return params


EXAMPLES = examples()


def test_readme_and_every_method_have_an_example():
    pages = {example.id.rpartition("-")[0] for example in EXAMPLES}
    assert pages >= {"README.md", *(f"{name}.md" for name in METHODS)}


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code):
    x, y = batch()
    names = {"student": Net(), "teacher": Net(8, seed=1), "x": x, "y": y, "torch": torch}
    exec(code, names)
    if "loss.backward()" in code:
        assert any(p.grad is not None for p in names["student"].parameters())


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#]+)#?([^)]*)\)", page.read_text()):
        if target.startswith("http"):
            continue
        # The documentation site cannot show a folder.
        assert (page.parent / target).is_file(), target
        if anchor:
            assert anchor in anchors(page.parent / target), f"{target}#{anchor}"


def anchors(page: Path) -> list[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", [*TEXTS, *RECIPES], ids=lambda page: page.name)
def test_commands_and_flags_exist(page):
    text = re.sub(r"\\\n[# ]*", "", page.read_text())  # lines that go on
    for command, words in re.findall(COMMAND, text):
        assert command in COMMANDS, command
        for flag in re.findall(r"--[a-z][a-z0-9-]*", words):
            assert flag in flags_of(command), f"{command} {flag}"
    for script in re.findall(r"python (bench/\w+\.py)", text):
        assert (ROOT / script).exists(), script


@pytest.mark.parametrize("page", [*TEXTS, *RECIPES], ids=lambda page: page.name)
def test_a_student_with_trained_weights_gets_a_low_rate(page):
    """The default rate is for new weights."""
    text = re.sub(r"\\\n[# ]*", "", page.read_text())
    for _, words in re.findall(COMMAND, text):
        if re.search(r"--student-weights|--(student|model) \S+:pretrained", words):
            assert "--lr" in words or "--recipe finetune" in words, words


def flags_of(command: str) -> set[str]:
    flags = {"--help"}
    for specs in COMMANDS[command].groups().values():
        for spec in specs:
            flags.update(spec.flags)
    return flags


def demo_errors() -> dict[str, str]:
    """{row: error with its spread} of results/demo.md."""
    text = (ROOT / "results" / "demo.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| \d+ \| ([\d.]+(?: ± [\d.]+)?) \|", text, re.MULTILINE)
    return dict(rows)


def test_the_pages_give_the_numbers_of_the_demos_own_page():
    errors = demo_errors()
    assert errors.keys() == {"WRN-16-2 teacher", "student alone", "AT", "KD", "AT+KD"}
    readme = (ROOT / "README.md").read_text()
    for row, error in errors.items():
        (cells,) = re.findall(rf"^\| {re.escape(row)} \|(.*)\|$", readme, re.MULTILINE)
        assert cells.split("|")[1].strip() == error, row
    page = (ROOT / "docs" / "methods" / "at.md").read_text()
    (before, after) = re.findall(r"demo\.md\) ([\d.]+) → ([\d.]+) % error", page)[0]
    assert before == f"{float(errors['student alone'].split()[0]):.1f}"
    assert after == f"{float(errors['AT'].split()[0]):.1f}"


def test_the_page_of_the_methods_gives_the_measured_costs():
    measured = (ROOT / "results" / "gradient.md").read_text().partition("\n## ")[0]
    overview = (ROOT / "docs" / "methods" / "README.md").read_text()
    for method in METHODS:
        row = rf"^\| {method} \|.* \| ([\d.]+) \| (\d+) \|$"
        (time, memory) = re.findall(row, measured, re.MULTILINE)[0]
        assert f"\n| `{method}` | {time} | {memory} |\n" in overview
