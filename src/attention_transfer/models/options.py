"""The options that name networks and their weights; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..options import Bool, option

MODEL_NAMES = (
    "wrn-16-1, nin-thin, timm/NAME[:pretrained], torchvision/NAME[:pretrained], zoo:NAME or "
    "FILE.py:FACTORY"
)


TeacherWeights = Annotated[
    str | None,
    option("State dict for the teacher, such as .safetensors or .pt.", default_text="none"),
]
# Only the user can give this permission, not a file.
TrustCode = Annotated[
    Bool,
    option(
        "Allow a run folder to execute the Python file of its network FILE.py:FACTORY.",
        default_text="refuse",
        changes_numbers=False,
    ),
]


@dataclass(frozen=True)
class NetworkOptions:
    """Network options."""

    model: Annotated[str, option(f"{MODEL_NAMES}.", default_text="required")] = ""
    teacher: Annotated[
        str | None,
        option(
            "A run folder (or one of the authors' scripts), a store of `teach`, or a model with "
            f"trained weights: {MODEL_NAMES}.",
            default_text="none",
        ),
    ] = None
    teacher_weights: TeacherWeights = None
    student_weights: Annotated[
        str | None,
        option(
            "Initial weights of the student: a state dict or a run folder; "
            "a head with other classes starts anew.",
            default_text="none",
        ),
    ] = None
    trust_code: TrustCode = False
