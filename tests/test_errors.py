"""Pieces of error messages."""

from __future__ import annotations

from attention_transfer.errors import RunError, UserError, first_few, first_line


def test_first_line():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"


def test_first_few():
    assert first_few(["a", "b", "c"]) == "a, b, c"
    assert first_few(["a", "b", "c", "d"]) == "a, b, c, …"
    assert first_few(["a", "b"], 1) == "a, …"


def test_a_line_break_in_a_name_does_not_break_the_message():
    assert str(UserError("a\nb does not exist")) == "a\\nb does not exist"
    assert str(RunError("cannot write a\r\nb")) == "cannot write a\\r\\nb"
