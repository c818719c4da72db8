"""The options of attention maps and of the loss between them (`maps.py`); imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from .options import Float, option

Convention = Literal["authors", "paper", "caffe"]
KindName = Literal["sum", "max", "attention"]
Kind = Annotated[
    KindName,
    option(
        "Reduce over channels by sum or by max; attention: the class token's attention in a "
        "transformer's block."
    ),
]
# Below 1 the gradient of |A|^p at 0 does not exist.
Exponent = Annotated[Float, option("Exponent of the activations in the map.", ge=1)]


@dataclass(frozen=True)
class MapOptions:
    """How an attention map is computed from activations."""

    kind: Kind = "sum"
    p: Exponent = 2.0
    axis: Annotated[
        Literal["space", "channel"],
        option("Map over positions, or over channels (pairs with equal channels only)."),
    ] = "space"

    @property
    def reads_attention(self) -> bool:
        """Whether the map comes from the attention of a layer, not from its features."""
        return self.kind == "attention"

    def map_name(self, layer: str) -> str:
        """The name of a layer's map under these options, such as `group0.sum2`."""
        if self.reads_attention:
            return f"{layer}.attention"
        over_channels = ".channel" * (self.axis == "channel")
        return f"{layer}.{self.kind}{self.p:g}{over_channels}"


@dataclass(frozen=True)
class LossOptions(MapOptions):
    """How two maps are compared."""

    convention: Annotated[
        Convention, option("Loss of a pair: mean of D² (authors), ½·‖D‖ (paper), ½·‖D‖² (caffe).")
    ] = "authors"
    resize: Annotated[
        Literal["map", "features", "bilinear"],
        option("If sizes differ: pool the maps, pool the features, or interpolate the maps."),
    ] = "map"
    norm: Annotated[
        Float, option("Order of ‖D‖ under --convention paper.", ge=1, allow_inf=True)
    ] = 2.0
    teacher_kind: Annotated[
        KindName | None,
        option("Kind of the teacher's maps, if it differs.", default_text="as --kind"),
    ] = None

    @property
    def of_teacher(self) -> LossOptions:
        """The options of the teacher's maps."""
        kind = self.teacher_kind or self.kind
        if kind == self.kind:
            return self
        return LossOptions(kind, self.p, self.axis, resize=self.resize)
