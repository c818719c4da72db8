"""The command `attention-transfer`: runs a subcommand and prints any error in one line."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from typing import NoReturn

from . import __version__
from .commands import COMMANDS
from .errors import (
    RankError,
    RunError,
    UserError,
    describe_unknown,
    first_line,
    is_out_of_memory,
    nearest,
)
from .examples import EXAMPLES
from .flags import Parser, add_options
from .train.signals import interrupt, signal_handlers

PROGRAM = "attention-transfer"
SUMMARY = (
    "Train a small network to look where a strong one looks "
    "(attention transfer, Zagoruyko & Komodakis 2017)."
)
# Errors of a path that the user gave; any other OSError is a failure of the run.
PATH_ERRORS = {
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
LONGEST_WORD = 300


def main(args: list[str] | None = None) -> None:
    """Runs a command. A user's mistake ends with status 2, a failed run with 1.

    Ctrl-C and SIGTERM end it with 130.

    Args:
        args: the command and its arguments, without the program; by default those of this process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # File names and terminals may use another encoding than UTF-8.
            stream.reconfigure(errors="backslashreplace")
    if args is None:
        args = sys.argv[1:]
    try:
        with signal_handlers(interrupt, signal.SIGTERM):
            _dispatch(args)
    except KeyboardInterrupt as stop:
        _leave(f"interrupted: {stop}" if str(stop) else "interrupted", 130)
    except UserError as error:
        _leave(str(error), 2)
    except RunError as error:
        _leave(str(error), 1, on_every_rank=isinstance(error, RankError))
    except BrokenPipeError:
        # The reader of the output has closed it. Python would fail again when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        unknown = describe_unknown(error)
        if isinstance(error, OSError) and error.errno in PATH_ERRORS and error.filename:
            _leave(f"{os.fsdecode(error.filename)}: {error.strerror}", 2)
        if is_out_of_memory(error):
            _leave(
                f"out of memory ({first_line(error)}): choose smaller batches or images", 1, True
            )
        _leave(unknown, 1, on_every_rank=True)


def _leave(message: str, status: int, on_every_rank: bool = False) -> NoReturn:
    # If several processes stop for the same reason, only the first one of the node prints it.
    if on_every_rank or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{PROGRAM}: {' '.join(map(_shortened, message.split()))}", file=sys.stderr)
    sys.exit(status)


def _shortened(word: str) -> str:
    """The word without its middle if it is very long, such as a number of 400 digits."""
    if len(word) <= LONGEST_WORD:
        return word
    return f"{word[:60]}…{word[-60:]}"


def _dispatch(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return
    if args[0] == "--version":
        print(f"{PROGRAM}, version {__version__}")
        return
    name = args[0]
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS)
        raise UserError(f"unknown command {name!r}{hint} (commands: {', '.join(COMMANDS)})")
    command = COMMANDS[name]
    examples = [f"{PROGRAM} {example}" for example in EXAMPLES[name]]
    parser = Parser(f"{PROGRAM} {name}", command.run.__doc__, examples)
    for title, specs in command.groups().items():
        add_options(parser, title, specs)
    command.run(parser.read(args[1:]))


def _overview() -> str:
    lines = [f"usage: {PROGRAM} [--help] [--version] COMMAND ...", "", SUMMARY, "", "commands:"]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:<11} {command.summary}")
    return "\n".join([*lines, "", f"`{PROGRAM} COMMAND --help` describes a command."])
