"""The stages of networks, and the pairs that "auto" picks: as numbers and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from ..models.network import Network, fixed_size
from ..models.start import run_once
from ..taps import Stage, explain, match_stages, stages, unpaired_stages
from .load import DEFAULT_SIDE, SMALL_MODELS, load_by_name

Facts = dict[str, Any]


def list_stages(
    model: str, teacher: str | None, image_size: int | None, trust_code: bool = False
) -> Facts:
    """The stages of each network and, with a teacher, the pairs and the unpaired stages.

    Raises:
        UserError: for a name that is neither a run nor a model, and for a network without stages.
    """
    names = [model] if teacher is None else [model, teacher]
    loaded = [load_by_name(name, trust_code) for name in names]
    own_sizes = [network.preprocess.size or fixed_size(network.module) for network in loaded]
    free = [name for name, size in zip(names, own_sizes, strict=True) if size is None]
    small = all(name.startswith(SMALL_MODELS) for name in free)
    side = image_size or (32 if small else DEFAULT_SIDE)
    networks, stages_of_all = [], []
    for name, network, own_size in zip(names, loaded, own_sizes, strict=True):
        size = own_size or (side, side)
        stages_of_all.append(_stages_of(name, network, size))
        networks.append(
            {
                "name": name,
                "image_size": list(size),
                "takes_one_size": own_size is not None,
                "stages": [_stage_facts(stage) for stage in stages_of_all[-1]],
            }
        )
    return {"networks": networks} | (_pair_facts(*stages_of_all) if teacher is not None else {})


def _stages_of(name: str, network: Network, size: tuple[int, int]) -> list[Stage]:
    example = torch.zeros(1, 3, *size)
    run_once(network, example, name)  # its errors mention the network and the size
    return stages(network.module, example)


def _stage_facts(stage: Stage) -> Facts:
    return {
        "layer": stage.name,
        "channels": stage.channels,
        "size": list(stage.size),
        "stride": stage.stride,
        "depth": stage.depth,
    }


def _pair_facts(student: Sequence[Stage], teacher: Sequence[Stage]) -> Facts:
    student_stage = {stage.name: stage for stage in student}
    teacher_stage = {stage.name: stage for stage in teacher}
    pairs = []
    for s, t in match_stages(student, teacher):
        why = explain(student_stage[s], teacher_stage[t])
        pairs.append({"student": s, "teacher": t, "why": why})
    unpaired = [
        {"side": side, "layer": layer, "why": why}
        for side, layer, why in unpaired_stages(student, teacher)
    ]
    return {"pairs": pairs, "unpaired": unpaired}


def print_stages(listed: Facts, console: Console) -> None:
    """Prints the result of `list_stages`: a table for each network, and one of the pairs."""
    for network in listed["networks"]:
        console.print(_stage_table(network))
    if "pairs" in listed:
        console.print(_pair_table(listed["pairs"], listed["unpaired"]))
        pairs = ",".join(f"{pair['student']}={pair['teacher']}" for pair in listed["pairs"])
        console.out(f"--pairs {pairs}")


def _stage_table(network: Facts) -> Table:
    height, width = network["image_size"]
    title = f"{network['name']}, images of {height}×{width}"
    if network["takes_one_size"]:
        title += ", its input size"
    numbers = [Column(text, justify="right") for text in ("channels", "size", "stride", "depth")]
    table = Table("layer", *numbers, title=title, title_justify="left")
    for stage in network["stages"]:
        height, width = stage["size"]
        table.add_row(
            stage["layer"],
            str(stage["channels"]),
            f"{height}×{width}",
            f"{stage['stride']:.3g}",
            str(stage["depth"]),
        )
    return table


def _pair_table(pairs: Sequence[Facts], unpaired: Sequence[Facts]) -> Table:
    table = Table("student", "teacher", "why", title="pairs", title_justify="left")
    for pair in pairs:
        table.add_row(pair["student"], pair["teacher"], pair["why"])
    for layer in unpaired:
        sides = (layer["layer"], "–") if layer["side"] == "student" else ("–", layer["layer"])
        table.add_row(*sides, layer["why"])
    return table
