"""The options of the transfer methods; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator

from ..map_options import LossOptions
from ..options import Bool, Float, Numbers, by_method, option

# The default method of a run with a teacher.
TEACHER_METHOD = "at+kd"
FALLS = ("constant", "linear", "cosine", "step")
DECAYS = (*FALLS, "warm-up", *(f"warm-up+{fall}" for fall in FALLS[1:]))

Beta = Float | Literal["auto"]


@dataclass(frozen=True)
class ActivationOptions(LossOptions):
    """Activation-based attention transfer (`at`)."""

    weights: Annotated[
        Numbers | None,
        option(
            "A factor for each pair of layers.",
            expected="a number for each pair, like 1,1,0.5",
            default_text="1 each",
        ),
    ] = None


@dataclass(frozen=True)
class DistillationOptions:
    """Knowledge distillation (`kd`)."""

    alpha: Annotated[
        Float, option("Weight α of distillation; the cross-entropy has 1 − α.", ge=0, le=1)
    ] = 0.9
    temperature: Annotated[Float, option("Temperature of the softened logits.", gt=0)] = 4.0


@dataclass(frozen=True)
class GradientOptions:
    """Methods on input gradients (`gradient`, `symmetry`)."""

    squared: Annotated[Bool, option("Use the squared norm (gradient, symmetry).")] = True


@dataclass(frozen=True)
class MethodOptions(GradientOptions, DistillationOptions, ActivationOptions):
    """The methods, their weights, and the layers that they pair."""

    method: Annotated[
        str | None,
        option(
            "none, at, kd, full, gradient, symmetry, min-l2, or a sum such as at+kd.",
            default_text=f"{TEACHER_METHOD} with a teacher, otherwise none",
        ),
    ] = None
    beta: Annotated[
        Beta | dict[str, Beta] | None,
        BeforeValidator(by_method),
        option(
            "Weight β of the method, or auto (at, full); METHOD=NUMBER,… for several methods.",
            expected="a number, auto, or METHOD=NUMBER,…",
            default_text="at: auto, full: 10000, others: 1",
        ),
    ] = None
    decay: Annotated[
        str | dict[str, str] | None,
        BeforeValidator(by_method),
        option(
            f"Schedule of β: {', '.join(FALLS)}, warm-up, or warm-up+linear and so on; "
            "METHOD=SCHEDULE,… for a single method (kd=linear is the schedule of α).",
            expected="a schedule, or METHOD=SCHEDULE,…",
            default_text="constant; at+kd: linear",
        ),
    ] = None
    pairs: Annotated[
        str,
        option(
            "Layers to pair: auto, last2 (the last two of auto), or "
            "STUDENT_LAYER=TEACHER_LAYER,… (see `stages`)."
        ),
    ] = "auto"
