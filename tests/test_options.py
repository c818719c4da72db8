"""Options: one field is the flag, its help, and the check of YAML, arguments and Python alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from attention_transfer.config import Recipe
from attention_transfer.errors import UserError
from attention_transfer.flags import Parser, add_options, default_as_text
from attention_transfer.options import (
    Bool,
    Float,
    Int,
    Numbers,
    checked,
    from_mapping,
    option,
    option_specs,
)


@dataclass(frozen=True)
class Example:
    count: Annotated[Int, option("How many.", ge=1)] = 3
    rate: Annotated[Float | None, option("How fast.", gt=0, lt=1, default_text="off")] = None
    kind: Annotated[Literal["sum", "max"], option("Which.")] = "sum"
    size: Annotated[Float, option("How large.", ge=1, allow_inf=True)] = 2.0
    factors: Annotated[Numbers, option("Factors.", expected="numbers like 1,2")] = (1.0, 2.5)
    deep: Annotated[Bool, option("Whether deep.", changes_numbers=False)] = True


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count is 0: expected a whole number ≥ 1"),
        ({"count": "0"}, "count is 0: expected a whole number ≥ 1"),
        ({"count": 1.0}, "count is 1.0: expected a whole number ≥ 1"),
        ({"count": True}, "count is True"),
        ({"count": "many"}, "count is 'many'"),
        ({"count": None}, "count is None"),
        ({"rate": 0}, "rate is 0: expected a number > 0 and < 1"),
        ({"rate": 1}, "rate is 1"),
        ({"rate": math.nan}, "rate is nan"),
        ({"rate": "nan"}, "rate is nan"),
        ({"size": 0.5}, "size is 0.5: expected a number ≥ 1"),
        ({"size": math.nan}, "size is nan"),
        (
            {"kind": "summ"},
            "kind is 'summ': expected one of sum, max; did you mean sum?",
        ),
        ({"kind": 5}, "kind is 5"),
        ({"factors": "1,x"}, "factors is '1,x': expected numbers like 1,2"),
        ({"factors": 5}, "factors is 5"),
        ({"deep": "yes"}, "deep is 'yes': expected true or false"),
        ({"deep": 1}, "deep is 1"),
        ({"cuont": 1}, "unknown option 'cuont'; did you mean count"),
    ],
)
def test_a_wrong_value_is_named(values, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        from_mapping(Example, values)


def test_text_and_lists_become_values():
    example = from_mapping(
        Example, {"count": "7", "rate": "5e-4", "factors": "1, 2,3", "size": "inf"}
    )
    assert example == Example(7, 5e-4, "sum", math.inf, (1.0, 2.0, 3.0))
    assert from_mapping(Example, {"factors": [1, 2]}).factors == (1.0, 2.0)
    assert type(from_mapping(Example, {"size": 3}).size) is float


def test_an_object_is_checked_too():
    assert checked(Example()) == Example()
    with pytest.raises(UserError, match="count is -1"):
        checked(Example(count=-1))


def test_a_flag_says_what_the_field_says():
    parser = Parser("program", "What it does.")
    add_options(parser, "examples", option_specs(Example).values())
    assert parser.read(["--count", "5", "--no-deep"]) == {"count": "5", "deep": False}
    text = " ".join(parser.format_help().split())
    for words in (
        "examples:",
        "--count N How many. [3]",
        "--rate X How fast. [off]",
        "--kind {sum,max} Which. [sum]",
        "--factors X,… Factors. [1,2.5]",
        "--deep, --no-deep Whether deep. [on]",
    ):
        assert words in text


@pytest.mark.parametrize("words", [["--cuont", "1"], ["--count"], ["--coun", "1"], ["extra"]])
def test_wrong_arguments_are_a_user_error(words):
    parser = Parser("program", None)
    add_options(parser, "examples", option_specs(Example).values())
    with pytest.raises(UserError, match=r"see program --help"):
        parser.read(words)


def test_every_option_of_a_run_is_documented():
    for spec in option_specs(Recipe).values():
        assert spec.help.endswith("."), spec.key
        assert default_as_text(spec) != "None", f"{spec.key} needs a default_text"
        assert len(spec.expected) > 3, spec.key
