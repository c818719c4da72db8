"""How numbers and names are written, the same everywhere in a report."""

from __future__ import annotations

import re
from typing import Any

MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"
ROOM = 20  # characters in the margin of a plot


def significant(value: float, digits: int = 3) -> str:
    """`value` with so many significant digits and no exponent: 1.32, 13.2, 132, 1320."""
    from math import floor, log10

    if value == 0:
        return "0"
    return f"{value:.{max(0, digits - 1 - floor(log10(abs(value))))}f}"


def count(value: float | None) -> str:
    """A number of things with its unit prefix: `0.18 M`, `1.23 G`, `41.2 k`."""
    if value is None:
        return NONE
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{significant(value / factor)} {unit}"
        if unit == "M" and value >= 1e5:
            return f"{value / factor:.2f} {unit}"
    return f"{value:.0f}"


def rate(value: float | None) -> str:
    """Images a second: `2.6 k`, `350`."""
    if value is None:
        return NONE
    for factor, unit in ((1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.0f}" if value >= 10 else significant(value, 2)


def plain(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else significant(value, digits)


def percent(value: float | None, decimals: int = 1) -> str:
    """A percentage given in percent: `25.7 %`."""
    return NONE if value is None else f"{value:.{decimals}f} %"


def signed(value: float, decimals: int = 1) -> str:
    """A difference with its sign: `−8.9`, `+0.3`, `0.0`."""
    text = f"{abs(value):.{decimals}f}"
    if float(text) == 0:
        return text
    return (MINUS if value < 0 else "+") + text


def times(value: float | None) -> str:
    """A ratio: `1.9×`, `0.26×`."""
    return "" if value is None else f"{significant(value, 2)}×"


def minutes(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    value = seconds / 60
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 0.1 else f"{value:.2f}"


def seeds(n: int) -> str:
    return "1 seed" if n == 1 else f"{n} seeds"


def model_name(model: str) -> str:
    """`wrn-16-2` as the field writes it: WRN-16-2; `nin-thin`: NIN-thin; anything else as it is."""
    head, dash, tail = model.partition("-")
    return head.upper() + dash + tail if head in ("wrn", "nin", "vgg") and dash else model


def data_name(data: Any) -> str:
    """The data's name without the folder it lies in."""
    kind, _, where = str(data).partition(":")
    if kind in ("folder", "parquet") and where:
        return where.rstrip("/").rsplit("/", 1)[-1]
    return where if kind == "hub" and where else kind


def setting(value: Any) -> str:
    """A value of a configuration in a line of text."""
    if isinstance(value, dict):
        return ",".join(f"{k}={setting(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ",".join(setting(v) for v in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def short(label: str) -> str:
    """A setting's label for the margin of a plot: `nets.py:resnet34 teacher` -> `resnet34 teacher`."""
    text = " ".join(re.split(r"[/:]", word)[-1] for word in label.split(" "))
    return text if len(text) <= ROOM else f"{text[: ROOM - 1]}…"
