"""What the terminal shows beside results: examples in each help, completion, no colour."""

from __future__ import annotations

import shlex
import subprocess
from importlib.util import find_spec

import pytest

from attention_transfer.cli import PROGRAM
from attention_transfer.commands import COMMANDS
from attention_transfer.console import make_console
from attention_transfer.examples import EXAMPLES
from attention_transfer.flags import Parser, add_options
from attention_transfer.studies.render import TextTable

LINES = [(name, line) for name, lines in EXAMPLES.items() for line in lines if name in COMMANDS]


def test_every_command_has_one():
    assert EXAMPLES.keys() >= COMMANDS.keys()
    assert all(1 <= len(lines) <= 3 for lines in EXAMPLES.values())


@pytest.mark.parametrize(("name", "line"), LINES)
def test_it_is_read(name, line):
    first, *words = shlex.split(line.partition(" > ")[0])
    assert first == name
    parser = Parser(name, None)
    for title, specs in COMMANDS[name].groups().items():
        add_options(parser, title, specs)
    parser.read(words)


def test_the_help_shows_them(command):
    text = command("export --help").out
    assert text.count("examples:\n") == 1
    for line in EXAMPLES["export"]:
        assert f"\n  {PROGRAM} {line}\n" in text


def test_no_control_characters_without_colour(command, monkeypatch):
    assert "\x1b" not in command("stages wrn-10-1").out
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then writes to a pipe as to a terminal
    assert "\x1b" in command("stages wrn-10-1").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in command("stages wrn-10-1").out


def test_text_is_no_picture(capsys):
    """As rich prints :one: unless it is told otherwise."""
    make_console().print("folder:one: 12 images", markup=False)
    assert capsys.readouterr().out == "folder:one: 12 images\n"


def test_names_in_tables_are_no_markup(capsys):
    table = TextTable(["", "error %"], [["AT [beta 30]", "1"], ["AT [/x]", "2"]])
    make_console().print(table.for_terminal("My pair [v2]"))
    said = capsys.readouterr().out
    assert all(name in said for name in ("My pair [v2]", "AT [beta 30]", "AT [/x]"))


@pytest.mark.skipif(find_spec("shtab") is None, reason="needs the extra completion")
class TestCompletion:
    def test_bash(self, command, tmp_path):
        (tmp_path / "complete").write_text(command("completion bash").out)
        script = (
            "source complete; COMP_WORDS=({words}); COMP_CWORD={last}; "
            "_shtab_attention_transfer; echo ${{COMPREPLY[@]}}"
        )
        for words, last, expected in (
            ("attention-transfer ex", 1, ["export"]),
            ("attention-transfer export --with", 2, ["--with-attention"]),
            ("attention-transfer train --precision b", 3, ["bf16"]),
        ):
            line = script.format(words=words, last=last)
            done = subprocess.run(
                ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True
            )
            assert done.stdout.split() == expected

    def test_zsh_names_all(self, command):
        script = command("completion zsh").out
        assert script.startswith("#compdef attention-transfer")
        assert all(f"\n    {name}:'" in script for name in COMMANDS)

    def test_without_its_extra(self, command, monkeypatch):
        monkeypatch.setattr("attention_transfer.completion.find_spec", lambda name: None)
        answer = command("completion bash")
        assert answer.status == 2 and "attention-transfer[completion]" in answer.err
