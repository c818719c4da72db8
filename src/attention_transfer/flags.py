"""Command-line flags, built from the options that dataclasses declare (`options.py`)."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

from .errors import UserError, nearest
from .options import OptionSpec

METAVARS = {int: "N", float: "X", tuple: "X,…", dict: "VALUE"}
WIDEST_HELP = 110


class Parser(argparse.ArgumentParser):
    """A parser that raises `UserError`s of one line, with the nearest valid flag."""

    def __init__(self, prog: str, description: str | None, examples: Sequence[str] = ()):
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            add_help=False,  # it comes last
            formatter_class=_Formatter,
        )
        self._positionals.title = "arguments"
        self.examples = examples

    def error(self, message: str) -> Any:
        raise UserError(f"{message} (see {self.prog} --help)")

    def format_help(self) -> str:
        text = super().format_help()
        if not self.examples:
            return text
        lines = "".join(f"  {example}\n" for example in self.examples)
        return f"{text}\nexamples:\n{lines}"

    def _short_usage(self) -> str:
        """The required arguments; the groups of the help list the others."""
        args = [self.prog]
        for action in self._actions:
            name = str(action.metavar)
            if action.nargs == "+":
                name += " ..."
            if not action.option_strings:
                args.append(name if action.required else f"[{name}]")
            elif action.required:
                args.append(f"{action.option_strings[0]} {name}")
        return " ".join([*args, "[OPTIONS]"])

    def read(self, args: list[str]) -> dict[str, Any]:
        """The arguments by name; flags that are not given are absent."""
        group = self.add_argument_group("help")
        group.add_argument("-h", "--help", action="help", help="Show this help.")
        self.usage = self._short_usage()
        # In `compare A --speed B`, `parse_args` would refuse B.
        given, unknown = self.parse_known_intermixed_args(args)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            hint = nearest(unknown[0].partition("=")[0], flags)
            self.error(f"unexpected argument {unknown[0]!r}{hint}")
        return vars(given)


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        width = min(shutil.get_terminal_size().columns, WIDEST_HELP)
        super().__init__(prog, max_help_position=28, width=width)


def add_options(parser: Parser, title: str, specs: Iterable[OptionSpec]) -> None:
    """Adds a group of flags to the help; positional arguments have a group of their own."""
    group = parser.add_argument_group(title)
    for spec in specs:
        if spec.positional:
            _add_positional(parser, spec)
        else:
            _add_flag(group, spec)


def _add_positional(parser: Parser, spec: OptionSpec) -> None:
    several = spec.kind is tuple
    nargs = None
    if several:
        nargs = "+"
    elif not spec.required:
        nargs = "?"
    settings: dict[str, Any] = {"nargs": nargs, "metavar": spec.key.upper(), "help": spec.help}
    if not spec.required:
        settings["default"] = argparse.SUPPRESS
    parser.add_argument(spec.key, **settings)


def _add_flag(group: Any, spec: OptionSpec) -> None:
    """Adds one flag. Its value stays text, which the dataclass parses like a value of YAML."""
    settings: dict[str, Any] = {"dest": spec.key, "default": argparse.SUPPRESS, "help": spec.help}
    if spec.required:
        settings["required"] = True
    else:
        settings["help"] += f" [{default_as_text(spec)}]"
    settings["help"] = settings["help"].replace("%", "%%")  # argparse formats it
    if spec.kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif spec.choices:
        settings["metavar"] = "{" + ",".join(spec.choices) + "}"
    else:
        settings["metavar"] = METAVARS.get(spec.kind, spec.key.rpartition("_")[2].upper())
    group.add_argument(*spec.flags, **settings)


def default_as_text(spec: OptionSpec) -> str:
    """The default of an option, as a user would type it after the flag."""
    if spec.default_text is not None:
        return spec.default_text
    if isinstance(spec.default, bool):
        return "on" if spec.default else "off"
    if isinstance(spec.default, tuple):
        return ",".join(f"{number:.4g}" for number in spec.default)
    if isinstance(spec.default, float):
        return f"{spec.default:g}"
    return str(spec.default)
