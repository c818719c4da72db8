"""The options that make a table differ from its default, for its title and file names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import named_recipe
from ..data.options import DataOptions
from .options import SEEDS, SMALLER, ReproduceOptions, StudyOptions
from .table_file import Table

LONGEST = 150  # characters of a file's name
# Options that make a study a different one, besides those of its runs.
STUDY_OPTIONS = (
    "recipe",
    "data",
    "student",
    "teacher",
    "methods",
    "values",
    "conventions",
    "pairs",
)


@dataclass(frozen=True)
class Changes:
    """Options by name, with the values that a person chose."""

    options: Mapping[str, Any]

    def title(self, title: str) -> str:
        """`Table 1 (with seeds 1, limit-train 2000)`."""
        if not self.options:
            return title
        words = [f"{key.replace('_', '-')} {_text(value)}" for key, value in self.options.items()]
        return f"{title} (with {', '.join(words)})"

    def stem(self, name: str) -> str:
        """`table1-seeds=1-limit_train=2000`: another table has files of its own."""
        words = [f"{key}={_text(value)}" for key, value in self.options.items()]
        stem = re.sub(r"[^\w.+=-]+", "-", "-".join([name, *words]))
        if len(stem) > LONGEST:
            digest = hashlib.sha256(stem.encode()).hexdigest()[:8]
            stem = f"{stem[:LONGEST]}-{digest}"
        return stem


def changes_of_table(
    table: Table, options: ReproduceOptions, changes: Mapping[str, Any]
) -> Changes:
    """The options that make a table differ from the paper's.

    Args:
        changes: recipe keys that override those of the table.
    """
    changed: dict[str, Any] = {}
    if options.rows:
        changed["rows"] = options.rows
    if options.seeds < SEEDS:
        changed["seeds"] = options.seeds
    spec = (options.data or {}).get("")
    if spec is not None and not table.data_names:
        recipe = {} if table.recipe is None else named_recipe(table.recipe)
        own = (recipe | table.options).get("data", DataOptions().data)
        if _kind(spec) != _kind(str(own)):
            changed["data"] = _kind(spec)
    return Changes(changed | {key: changes[key] for key in SMALLER if key in changes})


def changes_of_study(
    options: StudyOptions, given: Mapping[str, Any], changes: Mapping[str, Any]
) -> Changes:
    """The options that make a study differ from its default.

    Args:
        given: the options that the user gave.
        changes: recipe keys that override those of the study.
    """
    changed = {key: given[key] for key in STUDY_OPTIONS if key in given}
    if "data" in changed:
        changed["data"] = _kind(options.data)
    if options.seeds < StudyOptions.seeds:
        changed["seeds"] = options.seeds
    return Changes(changed | {key: changes[key] for key in SMALLER if key in changes})


def _kind(spec: str) -> str:
    return spec.partition(":")[0]


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
