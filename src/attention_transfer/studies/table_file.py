"""Reads table files: rows and settings of recipe keys, and published figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from ..config import read_recipe
from ..errors import UserError, check_choice, nearest, shown
from .options import TABLES

TEACHER = "teacher"  # the setting that is the teacher itself
# Recipe keys that are set by rows, by --seeds and by a person.
SET_ELSEWHERE = {
    "model": "in rows, as student",
    "teacher": "in rows",
    "seed": "as --seeds",
    "trust_code": "as the flag --trust-code, which no file may set",
}


class Pretraining(BaseModel, extra="forbid", frozen=True):
    """Runs that pretrain the networks of a table, on the data of this name."""

    recipe: str
    data: str


class Row(BaseModel, extra="forbid", frozen=True):
    """A student and its teacher, with the published figures by setting.

    `data` names the row's data set if the table has several; `options` are recipe keys of all its
    runs; `teacher_options` apply to its teacher only. `settings` replaces the table's settings.
    """

    student: str
    teacher: str | None = None
    name: str = ""
    data: str | None = None
    options: dict[str, Any] = {}
    teacher_options: dict[str, Any] = {}
    settings: dict[str, dict[str, Any]] | None = None
    published: dict[str, float | list[float]] = {}
    confirmed: list[str] = []

    @property
    def pair(self) -> str:
        """`wrn-16-2:wrn-16-1`, as --rows names it."""
        return f"{self.teacher}:{self.student}"

    @property
    def key(self) -> str:
        return self.name or self.pair


class Table(BaseModel, extra="forbid", frozen=True):
    """The content of a table file.

    `settings` are the columns of the paper's table, by name: recipe keys over those of `recipe`,
    `options` and the row. `metrics` are `error` and `top5_error`, in percent.
    """

    title: str
    source: str = ""
    recipe: str | None = None
    teacher_recipe: str | None = None
    options: dict[str, Any] = {}
    teacher_options: dict[str, Any] = {}
    teacher_seed: int = 0
    pretraining: Pretraining | None = None
    metrics: list[Literal["error", "top5_error"]] = ["error"]
    settings: dict[str, dict[str, Any]]
    rows: list[Row]

    @property
    def data_names(self) -> list[str]:
        """The names of the data sets that the user has to give."""
        return list(dict.fromkeys(row.data for row in self.rows if row.data))


def read_table(name: str) -> Table:
    """A table of the package by its name, or a user's table by its file.

    Raises:
        UserError: for an unknown name, and for a file that is not a table.
    """
    if name.endswith((".yaml", ".yml")):
        return parse_table(read_recipe(Path(name)), name)
    check_choice("table", name, TABLES)
    folder = resources.files("attention_transfer.recipes") / "tables"
    with resources.as_file(folder / f"{name}.yaml") as path:
        return parse_table(read_recipe(path), name)


def parse_table(values: Mapping[str, Any], name: str) -> Table:
    """A checked table; errors call it `name`."""
    try:
        table = Table.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        hint = nearest(str(first["loc"][-1]), Table.model_fields | Row.model_fields)
        raise UserError(f"{name}: {place}: {first['msg']}{hint}") from None
    for names in (table.settings, *(row.settings or {} for row in table.rows)):
        if TEACHER in names:
            raise UserError(
                f"{name}: a setting is called {TEACHER}, like the teacher's own row: expected "
                "another name"
            )
    _check_keys(table, name)
    _check_rows(table, name)
    for row in table.rows:
        settings = [*(row.settings or table.settings), TEACHER]
        for setting in (*row.published, *row.confirmed):
            check_choice(f"setting of {name}, row {row.key},", setting, settings)
    return table


def _check_keys(table: Table, name: str) -> None:
    """Refuses recipe keys in places where the plan replaces them."""
    places = {"options": table.options, "teacher_options": table.teacher_options}
    settings = dict(table.settings)
    for row in table.rows:
        places |= {f"options of {row.key}": row.options}
        places |= {f"teacher_options of {row.key}": row.teacher_options}
        settings |= {f"{key} of {row.key}": keys for key, keys in (row.settings or {}).items()}
    for place, keys in (*places.items(), *settings.items()):
        elsewhere = SET_ELSEWHERE | ({"method": "in settings"} if place in places else {})
        for key in keys:
            where = elsewhere.get(key.replace("-", "_"))
            if where is not None:
                raise UserError(f"{name}: {place} has {key}: expected it {where}")
        method = keys.get("method")
        if not isinstance(method, str | None):  # `method: no` is false in YAML
            raise UserError(
                f"{name}: {place} has method {shown(method)}: expected methods like at+kd"
            )


def _check_rows(table: Table, name: str) -> None:
    """Refuses rows that a reader of the table could not tell apart."""
    seen = set()
    for row in table.rows:
        if (row.name, row.pair) in seen:
            raise UserError(f"{name}: two rows are {row.key}: expected a name of its own for each")
        seen.add((row.name, row.pair))


def chosen_rows(table: Table, names: Sequence[str]) -> list[Row]:
    """The rows that --rows names, all without it.

    Raises:
        UserError: for a name that no row has.
    """
    if not names:
        return table.rows
    keys = [row.key for row in table.rows]
    valid = [*keys, *(row.pair for row in table.rows)]
    for name in names:
        check_choice("row", name, dict.fromkeys(valid))
    return [row for row in table.rows if row.key in names or row.pair in names]
