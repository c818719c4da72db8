"""The options of stores, and of the command that fills one; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from ..data.options import AugmentOptions, DataOptions, data_defaults
from ..errors import UserError
from ..map_options import MapOptions
from ..models.options import MODEL_NAMES, TeacherWeights, TrustCode
from ..options import (
    AUTO,
    Bool,
    Int,
    OptionSpec,
    comma_separated,
    from_mapping,
    option,
    option_specs,
    own_options,
    subset,
)
from ..outputs import Force, JsonFile
from ..runtime.options import RuntimeOptions


@dataclass(frozen=True)
class PrecisionOptions:
    """How exactly a store keeps a teacher's outputs."""

    store_dtype: Annotated[
        Literal["float16", "float32"], option("Precision of the stored maps and logits.")
    ] = "float16"
    top_k: Annotated[
        Int | None,
        option(
            "Keep this many logits per image; the other classes share the rest of the probability.",
            ge=1,
            default_text="all",
        ),
    ] = None


@dataclass(frozen=True)
class StoreOptions(PrecisionOptions):
    """Where and how a run keeps its teacher's outputs for fixed views."""

    store: Annotated[
        str | None,
        option(
            "With --views: folder that keeps the teacher's outputs for each view.",
            default_text="a folder in the cache",
            changes_numbers=False,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class TeachOptions(RuntimeOptions, PrecisionOptions, MapOptions, AugmentOptions, DataOptions):
    """The options of `teach`."""

    teacher: Annotated[
        str,
        option(
            "A run folder (or one of the authors' scripts), or a model with trained weights: "
            f"{MODEL_NAMES}."
        ),
    ]
    out: Annotated[Path, option("Store to write, or to continue.")]
    teacher_weights: TeacherWeights = None
    trust_code: TrustCode = False
    layers: Annotated[
        tuple[str, ...] | None,
        BeforeValidator(comma_separated),
        option("Layers whose maps are kept, such as group1,group2.", default_text="all stages"),
    ] = None
    views: Annotated[
        Int | None,
        option(
            "Number of fixed augmented views of each image, such as 4.",
            ge=1,
            default_text="required",
        ),
    ] = None
    batch_size: Annotated[Int, option("Images per batch, in each process.", ge=1)] = 128
    dry_run: Annotated[Bool, option("Print the size of the store, and write nothing.")] = False
    json: JsonFile = None
    force: Force = False

    @property
    def map_options(self) -> MapOptions:
        """The options of the maps that are stored."""
        return subset(self, MapOptions)


def teach_options(given: Mapping[str, Any]) -> TeachOptions:
    """The checked options of `teach`; options not given get the defaults of the data set."""
    if given.get("views") == AUTO:
        raise UserError(
            "--views auto is a third of a run's epochs, and a store has none: give a number, "
            "such as 4"
        )
    defaults = data_defaults(given.get("data", DataOptions().data))
    return from_mapping(TeachOptions, defaults | dict(given))


def teach_groups() -> dict[str, list[OptionSpec]]:
    """The flags of `teach`, by the titles of their groups in the help."""
    # They select the images of a run; a store has all images.
    left_out = ("limit_train", "limit_val", "val_split")
    return {
        "what to keep": [
            *own_options(TeachOptions),
            *option_specs(PrecisionOptions).values(),
            *option_specs(MapOptions).values(),
        ],
        "data": [spec for key, spec in option_specs(DataOptions).items() if key not in left_out],
        "augmentation": [
            spec for key, spec in option_specs(AugmentOptions).items() if key != "views"
        ],
        "this machine": [*option_specs(RuntimeOptions).values()],
    }
