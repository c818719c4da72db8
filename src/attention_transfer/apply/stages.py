"""Tables of the stages of networks, and of the pairs that "auto" makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Column, Table

from ..models.network import Network, fixed_size
from ..models.start import run_once
from ..run_folder import RunFolder
from ..taps import Stage, explain, match_stages, stages, unpaired_stages
from .load import SMALL_MODELS, load_by_name


def print_stages(
    model: str,
    teacher: str | None,
    image_size: int | None,
    console: Console,
    trust_code: bool = False,
) -> None:
    """Prints a table of each network's stages, and one of the pairs between the two.

    Raises:
        UserError: for a name that is neither a run nor a model, and for a network without stages.
    """
    names = [model] if teacher is None else [model, teacher]
    small = all(name.startswith(SMALL_MODELS) or RunFolder(name).exists for name in names)
    listed = []
    default_size = 32 if small else 224
    for name in names:
        network = load_by_name(name, trust_code)
        table, network_stages = _stage_table(name, network, image_size, default_size)
        console.print(table)
        listed.append(network_stages)
    if teacher is not None:
        console.print(_pair_table(*listed))
        pairs = ",".join(f"{s}={t}" for s, t in match_stages(*listed))
        console.print(f"--pairs {pairs}", markup=False, highlight=False, soft_wrap=True)


def _stage_table(
    name: str, network: Network, image_size: int | None, default_size: int
) -> tuple[Table, list[Stage]]:
    size = network.preprocess.size or fixed_size(network.module)
    if size is None:
        size = (image_size or default_size, image_size or default_size)
    title = f"{name}, images of {size[0]}×{size[1]}"
    if image_size not in (None, size[0]):
        title += ", the size that it takes"
    example = torch.zeros(1, 3, *size)
    run_once(network, example, name)  # its errors name the network and the size
    network_stages = stages(network.module, example)
    numbers = [Column(text, justify="right") for text in ("channels", "size", "stride", "depth")]
    table = Table("layer", *numbers, title=title, title_justify="left")
    for s in network_stages:
        height, width = s.size
        table.add_row(s.name, str(s.channels), f"{height}×{width}", f"{s.stride:.3g}", str(s.depth))
    return table, network_stages


def _pair_table(student: Sequence[Stage], teacher: Sequence[Stage]) -> Table:
    table = Table("student", "teacher", "why", title="pairs", title_justify="left")
    student_stage = {stage.name: stage for stage in student}
    teacher_stage = {stage.name: stage for stage in teacher}
    for s, t in match_stages(student, teacher):
        table.add_row(s, t, explain(student_stage[s], teacher_stage[t]))
    for side, layer, why in unpaired_stages(student, teacher):
        if side == "student":
            table.add_row(layer, "–", why)
        else:
            table.add_row("–", layer, why)
    return table
