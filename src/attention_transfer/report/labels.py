"""The labels of rows, and the options in which their settings differ."""

from __future__ import annotations

import string
from collections.abc import Sequence

from .formats import MISSING, option_value
from .rows import SettingRow, teacher_name
from .settings import applies, as_key, option_text, setting

ABBREVIATIONS = {"at": "AT", "kd": "KD"}
LONGEST_LABEL = 28  # longer labels are replaced by a letter, with the options in columns

# How labels write an option, in the order in which labels name options.
LABEL_PREFIXES = {
    "model": "", "teacher": "from ", "data": "on ",
    "beta": "β=", "alpha": "α=", "temperature": "T=",
}  # fmt: skip
SYMBOLS = {"beta": "β", "alpha": "α", "temperature": "T"}


def assign_labels(rows: list[SettingRow]) -> None:
    """Gives each row a unique label.

    The labels of rows with the same method contain all options that differ. If that is too long,
    they contain a letter, and `differences` has the options.
    """
    by_label: dict[str, list[SettingRow]] = {}
    for row in rows:
        row.label = _plain_label(row)
        by_label.setdefault(row.label, []).append(row)
    for namesakes in by_label.values():
        if len(namesakes) > 1:
            _tell_apart(namesakes)


def _plain_label(row: SettingRow) -> str:
    if row.first.command == "train":
        return f"{row.model} {row.role}"
    if row.method == "none":
        return "student alone"
    names = row.method.split("+")
    return "+".join(ABBREVIATIONS.get(name, name) for name in names)


def _tell_apart(rows: list[SettingRow]) -> None:
    texts = {name: option_texts(rows, name) for name in differing_options(rows)}
    for i, row in enumerate(rows):
        row.differences = {name: column[i] for name, column in texts.items()}
    labels = []
    for row in rows:
        words = [row.label]
        for name, text in row.differences.items():
            if text != MISSING:
                words.append(LABEL_PREFIXES.get(name, f"{name}=") + text)
        labels.append(" ".join(words))
    long = max(map(len, labels)) > LONGEST_LABEL
    for i, row in enumerate(rows):
        if long or len(set(labels)) < len(labels):
            row.label += f" {_letter(i)}"
        else:
            row.label, row.named = labels[i], frozenset(row.differences)


def _letter(index: int) -> str:
    """a, b, …, z, aa, ab, …"""
    first, last = divmod(index, 26)
    return (_letter(first - 1) if first else "") + string.ascii_lowercase[last]


def differing_options(rows: Sequence[SettingRow]) -> list[str]:
    """The options with different values among the rows that read them, options of labels first."""
    settings = [setting(row.first) for row in rows]
    names = set().union(*settings)
    order = [*LABEL_PREFIXES, *sorted(names - LABEL_PREFIXES.keys())]
    differing = []
    for name in order:
        values = {as_key(s.get(name)) for s in settings if applies(name, s)}
        if len(values) > 1:
            differing.append(name)
    return differing


def option_texts(rows: Sequence[SettingRow], name: str) -> list[str]:
    """The option's value in each row; different values have different texts."""
    settings = [setting(row.first) for row in rows]
    texts = []
    for row, options in zip(rows, settings, strict=True):
        text = option_text(name, options)
        if name == "teacher" and options.get("teacher"):
            text = str(teacher_name(row))
        texts.append(text)
    by_text: dict[str, str] = {}
    for text, options in zip(texts, settings, strict=True):
        value = as_key(options.get(name))
        if text != MISSING and by_text.setdefault(text, value) != value:
            # Two folders may have networks of one name, and two numbers may agree in six digits.
            return [
                written if written == MISSING else _in_full(options.get(name), written)
                for written, options in zip(texts, settings, strict=True)
            ]
    return texts


def _in_full(value: object, otherwise: str) -> str:
    if value is None:
        return otherwise
    return repr(value) if isinstance(value, float) else option_value(value)


def setting_columns(rows: Sequence[SettingRow]) -> dict[str, list[str]]:
    """By header, the values of each option that differs and is not in the labels."""
    # Teachers are ignored: their recipe normally differs from the students'.
    compared = [row for row in rows if row.role != "teacher"] or list(rows)
    columns = {}
    for name in differing_options(compared):
        # Command and method are in the label, the network in the next column.
        if name in ("command", "method", "model"):
            continue
        readers = [row for row in compared if applies(name, setting(row.first))]
        if all(name in row.named for row in readers):
            continue
        columns[SYMBOLS.get(name, name.replace("_", " "))] = option_texts(rows, name)
    return columns
