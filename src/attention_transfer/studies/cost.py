"""Study `cost`: time, FLOPs and memory of teachers and students, without training."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ..apply.inference import InferenceModel
from ..apply.load import load_by_name, own_size
from ..apply.speed import measure_in_turn
from ..errors import UserError, plural
from ..models.network import Network
from ..models.trained import Preprocess
from ..options import from_mapping
from ..outputs import write_numbers
from ..report.formats import MISSING, count, significant
from ..run_folder import replacing
from ..runtime.environment import environment
from ..runtime.options import RuntimeOptions
from ..runtime.resolve import count_flops, fast_bf16, resolve_runtime
from ..train.options import TrainingOptions
from .compute import saved_mib
from .options import StudyOptions
from .plots import save_cost_figure
from .publish import check_table_files, table_files
from .render import TextTable

PAIRS = (
    "wrn-16-2:wrn-16-1",
    "wrn-40-2:wrn-16-2",
    "timm/resnet50:timm/resnet18",
    "timm/resnet34:timm/mobilenetv3_small_100",
    "timm/convnext_tiny:timm/efficientnet_b0",
)
BATCH = 32
ROUNDS = 5
RATIOS = "The teacher's cost over the student's"
Line = dict[str, Any]


def run_cost(
    options: StudyOptions, changes: Mapping[str, Any], stem: Path, console: Console
) -> None:
    """Measures every network of the pairs in every form, interleaved; writes table and plot.

    The files are those of `table_files(stem)`.

    Raises:
        UserError: for a pair without a colon, and an unknown network.
    """
    device = {"device": changes.get("device", "auto")}
    runtime = resolve_runtime(from_mapping(RuntimeOptions, device))
    size = {"batch_size": changes.get("batch_size", BATCH)}
    batch = from_mapping(TrainingOptions, size).batch_size
    pairs = {pair: split_pair(pair) for pair in options.pairs or PAIRS}
    lines_file, _, page_file, picture = table_files(stem)
    check_table_files([lines_file, page_file, picture], options.force)
    lines: list[Line] = []
    notes: list[str] = []
    for pair, names in pairs.items():
        if options.dry_run:
            console.out(f"{pair}: {ROUNDS} rounds of each form")
            continue
        with console.status(pair):
            trust_code = bool(changes.get("trust_code"))
            lines += measure_pair(pair, names, runtime.device, batch, notes, trust_code)
    if options.dry_run:
        write_numbers(options.json, {"pairs": [*pairs], "rounds": ROUNDS})
        return
    machine = environment(runtime)
    title = f"Costs, batches of {batch}, on {machine_name(machine)}"
    tables = [cost_table(lines), ratio_table(lines)]
    console.print(tables[0].for_terminal(title))
    console.print(tables[1].for_terminal(RATIOS))
    for note in notes:
        console.out(note)
    head = {"title": title, "environment": machine, "notes": notes}
    with replacing(lines_file) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in [head, *lines]))
    with replacing(page_file) as partial:
        remarks = "".join(f"- {note}\n" for note in notes)
        text = "\n\n".join([f"# {title}", tables[0].markdown(), RATIOS, tables[1].markdown()])
        partial.write_text(f"{text}\n\n{remarks}", encoding="utf-8")
    write_numbers(options.json, head | {"rows": lines})
    save_cost_figure(lines, picture)
    console.out(f"written: {page_file}, {lines_file}, {picture}")


def split_pair(pair: str) -> tuple[str, str]:
    """Splits `teacher:student`; names of models may contain colons."""
    name = r"(zoo:[^:]+|[^:]+\.py:\w+|[^:]+(?::pretrained)?)"
    match = re.fullmatch(f"{name}:{name}", pair)
    if match is None:
        raise UserError(f"pairs has {pair!r}: expected TEACHER:STUDENT")
    return match[1], match[2]


def measure_pair(
    pair: str,
    names: tuple[str, str],
    device: str,
    batch: int,
    notes: list[str],
    trust_code: bool = False,
) -> list[Line]:
    """A line for each network and form."""
    forms: dict[tuple[str, str], tuple[nn.Module, Tensor]] = {}
    facts: dict[str, Line] = {}
    for role, name in zip(("teacher", "student"), names, strict=True):
        network = load_by_name(name, trust_code)
        size = own_size(name, network) or (224, 224)
        images = torch.rand(batch, 3, *size, device=device)
        images = images.to(memory_format=torch.channels_last)
        for form, model in make_forms(network, size, device, notes).items():
            forms[role, form] = model, images
        facts[role] = describe(network, images) | {"network": name, "size": list(size)}
    lines = []
    for (role, form), speed in measure_in_turn(forms, ROUNDS).items():
        lines.append({"pair": pair, "role": role, "form": form} | facts[role] | speed)
    return lines


def make_forms(
    network: Network, size: tuple[int, int], device: str, notes: list[str]
) -> dict[str, nn.Module]:
    """The network in fp32, in bf16 and exported; adds a note if it cannot be exported."""
    module = network.module.to(device).to(memory_format=torch.channels_last).eval()
    preprocess = Preprocess(*network.preprocess.statistics, size).to(device)
    forms: dict[str, nn.Module] = {"fp32": InferenceModel(module, preprocess, "fp32")}
    if fast_bf16(device):
        forms["bf16"] = InferenceModel(module, preprocess, "bf16")
    try:
        forms["exported"] = exported(module, preprocess, size, device)
    except Exception as error:  # tracing raises many kinds of exceptions
        notes.append(f"{network.name} cannot be exported: {type(error).__name__}")
    return forms


class Exported(nn.Module):
    """The graph of `export --format pt2`, which has no training and eval modes."""

    def __init__(self, graph: nn.Module):
        super().__init__()
        self.__dict__["graph"] = graph  # not a child module: a graph refuses eval()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.__dict__["graph"](x)
        return logits


def exported(
    module: nn.Module, preprocess: nn.Module, size: tuple[int, int], device: str
) -> nn.Module:
    whole = nn.Sequential(preprocess, module).eval()
    example = torch.rand(2, 3, *size, device=device)  # a batch size of 1 would become a constant
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(whole, (example,), dynamic_shapes=shapes)
    return Exported(program.module())


def describe(network: Network, images: Tensor) -> Line:
    """The costs other than time: parameters, FLOPs, activations of a training step."""
    module = network.module
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "flops": count_flops(module.eval(), images[:1]),
        "activation_mib": round(saved_mib(module, images), 2),
    }


def cost_table(lines: list[Line]) -> TextTable:
    """A row for each network and form; students with ratios to their teachers."""
    headers = [
        "network", "form", "latency ms (batch 1)", "images/s", "parameters", "FLOPs",
        "training activations MiB", "inference peak MiB",
    ]  # fmt: skip
    rows = []
    for line in lines:
        latency, rate = line["latency_ms"], line["images_per_second"]
        peak = line["peak_mib"]
        rows.append(
            [
                f"{line['role']} {line['network']}",
                line["form"],
                _with_range(latency),
                _with_range(rate),
                count(line["parameters"]),
                count(line["flops"]),
                significant(line["activation_mib"]),
                MISSING if peak is None else significant(peak, 2),
            ]
        )
    return TextTable(headers, rows, labels=2)


def ratio_table(lines: list[Line]) -> TextTable:
    """A row for each pair: the teacher's cost / the student's, in each form that both have."""
    by_pair: dict[str, dict[str, dict[str, Line]]] = {}
    for line in lines:
        by_pair.setdefault(line["pair"], {}).setdefault(line["form"], {})[line["role"]] = line
    forms = list(dict.fromkeys(line["form"] for line in lines))
    headers = ["", "parameters", "FLOPs", "training activations"]
    headers += [f"latency, {form}" for form in forms] + [f"images/s, {form}" for form in forms]
    rows = []
    for by_form in by_pair.values():
        teacher, student = by_form["fp32"]["teacher"], by_form["fp32"]["student"]
        row = [f"{teacher['network']} → {student['network']}"]
        for key in ("parameters", "flops", "activation_mib"):
            row.append(f"{teacher[key] / student[key]:.1f}")
        row += [_times(by_form.get(form, {}), "latency_ms") for form in forms]
        row += [_times(by_form.get(form, {}), "images_per_second") for form in forms]
        rows.append(row)
    return TextTable(headers, rows)


def _times(by_role: Mapping[str, Line], key: str) -> str:
    """The speed-up of the student over the teacher."""
    if by_role.keys() < {"teacher", "student"}:
        return MISSING
    teacher, student = (by_role[role][key]["median"] for role in ("teacher", "student"))
    times = student / teacher if key == "images_per_second" else teacher / student
    return f"{times:.1f}"


def _with_range(spread: Mapping[str, float]) -> str:
    low, high = significant(spread["low"]), significant(spread["high"])
    return f"{significant(spread['median'])} ({low}–{high})"


def machine_name(record: Mapping[str, Any]) -> str:
    hardware = record["hardware"]
    threads = plural(record["auto"]["threads"], "thread")
    return str(hardware["gpu"] or f"{threads} of {hardware['cpu']}")
