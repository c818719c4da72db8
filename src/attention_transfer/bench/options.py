"""The options of the benches; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..options import Int, option
from ..outputs import Force, JsonFile
from ..runtime.options import Device

NAMES = ("step", "epoch", "loss", "teacher", "data", "gradient", "compile")


@dataclass(frozen=True)
class BenchCommandOptions:
    """The bench to run."""

    name: Annotated[str, option(f"{', '.join(NAMES)}.", positional=True)]
    json: JsonFile = None
    force: Force = False


@dataclass(frozen=True)
class BenchOptions:
    """Options of the benches."""

    student: Annotated[
        str,
        option("Student network.", default_text="wrn-16-1; gradient: nin-thin-no-bn"),
    ] = "wrn-16-1"
    teacher: Annotated[
        str,
        option("Teacher network.", default_text="wrn-16-2; gradient: nin-wide-no-bn"),
    ] = "wrn-16-2"
    batch_size: Annotated[
        Int, option("Images per step.", ge=1, default_text="128; compile: 64")
    ] = 128
    rounds: Annotated[
        Int,
        option("Number of rounds; each measures every row.", ge=1, default_text="9; compile: 1"),
    ] = 9
    steps: Annotated[
        Int,
        option(
            "Steps per measurement; compile: steps of the long run.",
            ge=1,
            default_text="8; compile: 600",
        ),
    ] = 8
    images: Annotated[Int, option("Images per epoch (epoch, data, compile).", ge=1)] = 6400
    device: Annotated[Device, option("Device to compute on.")] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], option("Precision of the networks; bf16 uses autocast.")
    ] = "auto"
    compile: Annotated[Literal["on", "off"], option("Also measure the compiled rows.")] = "on"
    data: Annotated[
        str | None,
        option("Folder of JPEGs (data).", default_text="crops of scikit-learn's photographs"),
    ] = None


# The benches that do not read an option.
UNREAD: dict[str, tuple[str, ...]] = {
    "student": ("loss", "data"),
    "teacher": ("loss", "data"),
    "steps": ("epoch",),
    "images": ("step", "loss", "teacher", "gradient"),
    "precision": ("loss", "data"),
    "compile": ("data", "compile"),
    "data": tuple(name for name in NAMES if name != "data"),
}
# Where the defaults of a bench differ from those of `step`.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gradient": {"student": "nin-thin-no-bn", "teacher": "nin-wide-no-bn"},
    # The batch size of the demo's students.
    "compile": {"batch_size": 64, "rounds": 1, "steps": 600},
}
