"""The options of `reproduce` and `study`; imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ..data.options import COLUMNS
from ..options import Bool, Float, Int, comma_separated, option
from ..outputs import Force, JsonFile

TABLES = ("table1", "table2", "table3", "table4", "table5")
STUDIES = (
    "beta",
    "mechanisms",
    "cost",
    "same-architecture",
    "few-labels",
    "localisation",
)
# Keys of the recipe that are flags of `reproduce` and `study`, for all of their runs.
PASSED_ON = (
    *("epochs", "batch_size", "max_steps", "limit_train", "limit_val", "image_size"),
    *("views", "stream", "workers", "device", "precision", "compile", "trust_code"),
)
# Those with which a table is no longer comparable with the paper's.
SMALLER = ("epochs", "max_steps", "limit_train", "limit_val", "image_size", "batch_size", "views")


def named_specs(value: Any) -> Any:
    """`"cub=folder:a,scenes=folder:b"` -> a mapping; a single spec has the name "" ."""
    if not isinstance(value, str):
        return value
    if not re.match(r"[A-Za-z]\w*=", value):
        return {"": value}
    # Not at every comma: a spec may contain some, as in {train,val} and #image=photo,label=breed.
    columns = "|".join(COLUMNS)
    parts = re.split(rf",(?!(?:{columns})=)(?=[A-Za-z]\w*=)", value)
    pairs = [part.partition("=") for part in parts]
    return {name: spec for name, _, spec in pairs}


SEEDS = 5  # of the paper's tables
Names = Annotated[tuple[str, ...], BeforeValidator(comma_separated)]
Positive = Annotated[Float, Field(gt=0, allow_inf_nan=False)]
Positives = Annotated[tuple[Positive, ...], BeforeValidator(comma_separated)]


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of many runs: number of seeds, folder, and number of parallel runs."""

    seeds: Annotated[Int, option("Seeds of each setting, from 0.", ge=1)] = 3
    jobs: Annotated[
        Int, option("Runs to train at the same time, each with its share of the cores.", ge=1)
    ] = 1
    out: Annotated[
        Path,
        option("Folder for runs and tables; tables and studies in the same folder share runs."),
    ] = Path("runs/evidence")
    dry_run: Annotated[Bool, option("Print the plan (runs, hours, disk) and stop.")] = False
    json: JsonFile = None
    force: Force = False


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions(PlanOptions):
    """The table of the paper, its rows, data and seeds."""

    table: Annotated[str, option(f"{', '.join(TABLES)}, or a table file (YAML).", positional=True)]
    rows: Annotated[
        Names,
        option(
            "Rows of the table, by name or as TEACHER:STUDENT.",
            expected="names of rows, like wrn-16-2:wrn-16-1",
            default_text="all",
        ),
    ] = ()
    seeds: Annotated[Int, option("Number of seeds of each setting, from 0.", ge=1)] = SEEDS
    data: Annotated[
        dict[str, str] | None,
        BeforeValidator(named_specs),
        option(
            "The images, as for train; NAME=SPEC,… if the table has several data sets.",
            expected="a data spec, or NAME=SPEC,…",
            default_text="the table's",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class StudyOptions(PlanOptions):
    """The study, its networks and its data."""

    study: Annotated[str, option(f"{', '.join(STUDIES)}.", positional=True)]
    student: Annotated[str, option("Student network.", default_text="the study's")] = ""
    teacher: Annotated[
        str,
        option(
            "Teacher: a run folder or zoo:NAME, or a network that the study trains.",
            default_text="the study's",
        ),
    ] = ""
    recipe: Annotated[
        str,
        option(
            "Recipe of all runs.",
            default_text="digits-student; digits-teacher for teachers",
        ),
    ] = ""
    data: Annotated[str, option("The images, as for train.", default_text="the recipe's")] = ""
    methods: Annotated[
        Names,
        option("Methods to compare.", expected="methods, like at,kd", default_text="the study's"),
    ] = ()
    values: Annotated[
        Positives,
        option(
            "beta: values of β; few-labels: shares of the training images, in percent; "
            "localisation: epochs of each network.",
            expected="positive numbers, like 0.3,1,3",
            default_text="the study's",
        ),
    ] = ()
    conventions: Annotated[
        Names,
        option("beta: conventions of the loss.", expected="conventions, like authors,caffe",
               default_text="all three"),
    ] = ()  # fmt: skip
    pairs: Annotated[
        Names,
        option(
            "cost: pairs of networks.",
            expected="TEACHER:STUDENT,…",
            default_text="two of the paper's and three of timm's",
        ),
    ] = ()
