"""The options of `view`; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ..map_options import Exponent
from ..models.options import MODEL_NAMES, TrustCode
from ..options import Int, option


@dataclass(frozen=True)
class ViewOptions:
    """The networks to show, and the address of the page."""

    networks: Annotated[
        tuple[str, ...],
        option(
            f"Run folders, or models: {MODEL_NAMES}; the teacher first.",
            positional=True,
        ),
    ]
    host: Annotated[str, option("Loopback address to listen on: 127.0.0.1, ::1 or localhost.")] = (
        "127.0.0.1"
    )
    port: Annotated[Int, option("Port of the page; 0: any free one.", ge=0, le=65535)] = 8765
    kind: Annotated[Literal["sum", "max"], option("Reduce over channels by sum or by max.")] = "sum"
    p: Exponent = 2.0
    trust_code: TrustCode = False
