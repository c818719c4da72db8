"""The documentation site is made from the repository's own files, under their own paths.

So a link between two pages leads to the same file on the site and in the repository.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff")
FOLDERS = ("docs", "results")
# Beside pages and pictures, what pages link to: recipes, sources and scripts.
LINKED = re.compile(r"\]\(([^)#:\s]+)[^)]*\)")


def site_files() -> list[Path]:
    """The pages and pictures of the site, and the files that the pages link to."""
    pages = [ROOT / name for name in PAGES]
    for folder in FOLDERS:
        for pattern in ("*.md", "*.ipynb", "*.png", "*.jpg", "*.svg"):
            pages += sorted((ROOT / folder).rglob(pattern))
    files = dict.fromkeys(pages)
    for page in pages:
        if page.suffix == ".md":
            for target in LINKED.findall(page.read_text(encoding="utf-8")):
                linked = (page.parent / target).resolve()
                if linked.is_file():
                    files[linked] = None
    return list(files)


@event_priority(100)  # before the plugins look for their files
def on_files(files: Files, config: Any) -> Files:
    """Puts the repository's files in the place of those of `docs_dir`."""
    themes = [file for file in files if file.src_dir != config.docs_dir]
    mine = []
    for path in site_files():
        name = path.relative_to(ROOT).as_posix()
        mine.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    _add_more(config, {file.src_uri for file in mine})
    return Files([*themes, *mine])


def _add_more(config: Any, names: set[str]) -> None:
    """Pages that the nav does not name go under "More"."""
    named = set(re.findall(r"[\w./-]+\.(?:md|ipynb)", str(config.nav)))
    more = sorted(n for n in names - named if n.endswith((".md", ".ipynb")))
    if more:
        config.nav.append({"More": more})
