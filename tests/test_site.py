"""The documentation site: its pages exist, and what they quote is what the package says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import attention_transfer

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "attention_transfer"
NAV = re.findall(r"[\w./-]+\.(?:md|ipynb)", (ROOT / "mkdocs.yml").read_text())


def test_every_page_of_the_navigation_exists():
    assert len(NAV) > 20
    for name in NAV:
        assert (ROOT / name).is_file(), name


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    named = re.findall(r"^::: attention_transfer\.(\w+)$", page, re.MULTILINE)
    assert sorted(named) == sorted(set(attention_transfer.__all__) - {"__version__"})


def test_pictures_are_small():
    for picture in (ROOT / "docs" / "pictures").glob("*"):
        assert picture.stat().st_size < 150_000, picture


def constants() -> Iterator[str]:
    """The strings of the package's code; those of an f-string without what it fills in."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def quoted_messages() -> list[str]:
    """The messages of docs/troubleshooting.md: what a table or a quotation begins with."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    return re.findall(r"^[|>] `([^`]+)`", page, re.MULTILINE)


MESSAGES = quoted_messages()
CONSTANTS = "\n".join(constants())


def test_troubleshooting_quotes_many_messages():
    assert len(MESSAGES) > 10


@pytest.mark.parametrize("message", MESSAGES)
def test_troubleshooting_quotes_what_the_code_says(message):
    for part in re.split("…|: ", message):
        words = part.strip(" :;,.()?")
        if len(words) > 8:
            assert words in CONSTANTS, words
