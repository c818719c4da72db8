"""The examples in the documents run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from toys import Net, batch

from attention_transfer.methods import METHODS

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
EXAMPLES = [
    pytest.param(code, id=f"{page.name}-{j}")
    for page in [ROOT / "README.md", *PAGES]
    for j, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    )
]


def test_every_method_has_a_page_with_an_example():
    assert {p.stem for p in PAGES} >= set(METHODS)
    assert {p.id.rpartition("-")[0] for p in EXAMPLES} >= {f"{name}.md" for name in METHODS} | {
        "README.md"
    }


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code, capsys):
    x, y = batch()
    names = {"student": Net(), "teacher": Net(8, seed=1), "x": x, "y": y, "torch": torch}
    exec(code, names)
    if "transfer" in names:
        assert "loss.backward()" not in code or any(
            p.grad is not None for p in names["student"].parameters()
        )


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", *PAGES, *sorted((ROOT / "results").glob("*.md"))],
    ids=lambda p: p.name,
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target
