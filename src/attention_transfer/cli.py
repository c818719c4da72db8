"""The command `attention-transfer`: finds the command, and turns what went wrong into one line."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from . import __version__
from .commands import COMMANDS
from .errors import LocalError, RunError, UserError, first_line, nearest
from .flags import Parser, add_options

PROGRAM = "attention-transfer"
SUMMARY = (
    "Train a small network to look where a strong one looks "
    "(attention transfer, Zagoruyko & Komodakis 2017)."
)
# What the user's paths can be wrong with; any other OSError is a failure of the run.
PATH_ERRORS = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


def main() -> None:
    """Runs a command. A user's mistake ends with status 2, a failed run with 1, Ctrl-C with 130."""
    try:
        _dispatch(sys.argv[1:])
    except KeyboardInterrupt as stop:
        _leave(f"interrupted: {stop}" if str(stop) else "interrupted", 130)
    except UserError as error:
        _leave(str(error), 2, on_every_rank=isinstance(error, LocalError))
    except RunError as error:
        _leave(str(error), 1)
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("ATTENTION_TRANSFER_TRACEBACK"):
            raise
        if isinstance(error, PATH_ERRORS):
            _leave(f"{error.filename or 'a file'}: {error.strerror or error}", 2)
        message = f"{type(error).__name__}: {first_line(error)}"
        _leave(f"{message} (ATTENTION_TRANSFER_TRACEBACK=1 shows where)", 1, on_every_rank=True)


def _leave(message: str, status: int, on_every_rank: bool = False) -> NoReturn:
    # Where a run has several processes, the first one speaks for all that stop for one reason.
    if on_every_rank or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return
    if words[0] == "--version":
        print(f"{PROGRAM}, version {__version__}")
        return
    name = words[0]
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS)
        raise UserError(f"unknown command {name!r}{hint} (commands: {', '.join(COMMANDS)})")
    command = COMMANDS[name]
    parser = Parser(f"{PROGRAM} {name}", command.run.__doc__)
    for title, specs in command.groups().items():
        add_options(parser, title, specs)
    command.run(parser.read(words[1:]))


def _overview() -> str:
    lines = [f"usage: {PROGRAM} [--help] [--version] COMMAND ...", "", SUMMARY, "", "commands:"]
    for name, command in COMMANDS.items():
        summary = str(command.run.__doc__).splitlines()[0]
        lines.append(f"  {name:<11} {summary}")
    return "\n".join([*lines, "", f"`{PROGRAM} COMMAND --help` explains each."])
