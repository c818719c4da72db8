"""Formats the numbers and names of a report."""

from __future__ import annotations

import math
from typing import Any

MINUS, MISSING = "\N{MINUS SIGN}", "\N{EN DASH}"


def significant(value: float, digits: int = 3) -> str:
    """`value` with this many significant digits and no exponent: 1.32, 13.2, 132, 1320."""
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, digits - 1 - magnitude)}f}"


def count(value: float) -> str:
    """A number of parameters or operations: `0.18 M`, `1.23 G`, `41.2 k`."""
    # Small networks are compared in millions of parameters, so 180,000 is 0.18 M and not 180 k.
    if 1e5 <= value < 1e6:
        return f"{value / 1e6:.2f} M"
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{significant(value / factor)} {prefix}"
    return f"{value:.0f}"


def rate(value: float) -> str:
    """Images per second: `2.6 k`, `350`, `3.2`."""
    for factor, prefix in ((1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.1f} {prefix}"
    if value >= 10:
        return f"{value:.0f}"
    return significant(value, 2)


def minutes(seconds: float) -> str:
    """Seconds as minutes: `124`, `1.1`, `0.05`."""
    value = seconds / 60
    if value >= 100:
        return f"{value:.0f}"
    if value >= 0.1:
        return f"{value:.1f}"
    return f"{value:.2f}"


def signed(value: float, digits: int) -> str:
    """A difference with its sign: `−8.9`, `+0.3`, `0.0`."""
    text = f"{value:+.{digits}f}"
    if float(text) == 0:
        return text[1:]  # -0.04 rounds to "-0.0"
    return text.replace("-", MINUS)


def percent(share: float | None) -> str:
    """A share in [0, 1] in percent, without the unit."""
    return MISSING if share is None else f"{100 * share:.1f}"


def model_name(model: str) -> str:
    """`wrn-16-2` -> `WRN-16-2`, `nin-thin` -> `NIN-thin`; other names unchanged."""
    family, dash, size = model.partition("-")
    if dash and family in ("wrn", "nin"):
        return f"{family.upper()}-{size}"
    return model


def data_name(data: Any) -> str:
    """The name of a data set without its folder: `cifar10:/data/cifar` -> `cifar10`."""
    kind, _, location = str(data).partition(":")
    if kind in ("folder", "parquet") and location:
        return location.rstrip("/").rpartition("/")[-1]
    if kind == "hub" and location:
        return location
    return kind


def option_value(value: Any) -> str:
    """The value of an option as one line of text."""
    if isinstance(value, dict):
        return ",".join(f"{key}={option_value(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ",".join(map(option_value, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def short_label(label: str) -> str:
    """A label for the margin of a chart: `nets.py:resnet34 teacher` -> `resnet34 teacher`."""
    words = [word.replace("/", ":").rpartition(":")[-1] for word in label.split(" ")]
    return truncate(" ".join(words), 20)


def truncate(text: str, length: int) -> str:
    """`text`, or its beginning and an ellipsis if it has more than `length` characters."""
    if len(text) <= length:
        return text
    return f"{text[: length - 1]}…"
