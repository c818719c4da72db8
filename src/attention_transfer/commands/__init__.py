"""The commands. Each is a dataclass of options and a function, whose docstring is the help.

Heavy packages are imported inside the functions, so that --help is quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..options import from_mapping, option
from .evidence import EVIDENCE
from .networks import NETWORKS
from .shared import Command
from .training import TRAINING


@dataclass(frozen=True)
class CompletionOptions:
    """The shell to complete in."""

    shell: Annotated[Literal["bash", "zsh"], option("bash or zsh.", positional=True)]


def completion(arguments: dict[str, Any]) -> None:
    """Print a script that completes commands and flags in bash or zsh."""
    options = from_mapping(CompletionOptions, arguments)
    from ..completion import completion_script

    described = {}
    for name, command in COMMANDS.items():
        described[name] = (command.summary, command.groups())
    print(completion_script("attention-transfer", options.shell, described))


# In the order of the help.
COMMANDS = TRAINING | NETWORKS | EVIDENCE | {"completion": Command(completion, CompletionOptions)}
