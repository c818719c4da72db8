"""The runtime options: devices, precision, compilation; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from ..options import Bool, Int, option

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]


def _yaml_switch(value: Any) -> Any:
    """YAML reads the words on and off as booleans."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return value


@dataclass(frozen=True)
class RuntimeOptions:
    """Runtime options."""

    device: Annotated[Device, option("Device to compute on.", changes_numbers=False)] = "auto"
    precision: Annotated[
        Precision,
        option("Precision of the networks; bf16 uses autocast.", changes_numbers=False),
    ] = "auto"
    compile: Annotated[
        Literal["auto", "on", "off", "graphs"],
        BeforeValidator(_yaml_switch),
        option(
            "torch.compile; auto: if the run is long enough; graphs: with CUDA graphs.",
            changes_numbers=False,
        ),
    ] = "auto"
    deterministic: Annotated[
        Bool,
        option(
            "Use deterministic algorithms only: a repeated run gives the same bits on one machine.",
            changes_numbers=False,
        ),
    ] = False
    devices: Annotated[
        Int,
        option(
            "Processes (GPUs) per node.",
            ge=1,
            default_text="1, or torchrun's",
            changes_numbers=False,
        ),
    ] = 1
    nodes: Annotated[
        Int,
        option("Number of nodes.", ge=1, default_text="1, or torchrun's", changes_numbers=False),
    ] = 1
