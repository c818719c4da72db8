"""Shell completion of the commands and their flags in bash and zsh, with shtab."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from importlib.util import find_spec

from .errors import UserError
from .flags import Parser, add_options
from .options import OptionSpec

Groups = Mapping[str, Iterable[OptionSpec]]


def completion_script(program: str, shell: str, commands: Mapping[str, tuple[str, Groups]]) -> str:
    """The completion script of a shell, bash or zsh.

    Args:
        commands: the summary of each command, and its options by the titles of their groups.

    Raises:
        UserError: if shtab is missing.
    """
    if find_spec("shtab") is None:
        raise UserError("completion needs shtab: pip install 'attention-transfer[completion]'")
    import shtab

    parser = argparse.ArgumentParser(program)
    subparsers = parser.add_subparsers(parser_class=Parser)
    for name, (summary, groups) in commands.items():
        command = subparsers.add_parser(name, description=summary, help=summary)
        specs = {spec.key: spec for group in groups.values() for spec in group}
        for title, group in groups.items():
            add_options(command, title, group)
        for action in command._actions:
            choices = specs[action.dest].choices
            if choices:
                action.choices = choices
            elif action.nargs != 0:  # 0: a switch, which takes no value
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    script: str = shtab.complete(parser, shell)
    return script
