"""Which networks of timm can be a teacher: stages found, read, and paired with a ResNet-18.

    python bench/zoo.py --json results/zoo.json [--limit N]

This takes shapes only, so that networks and images are on PyTorch's meta device: no weights, no
arithmetic. A process of its own examines each network and is killed after a time limit. The JSON
file gets a page of the same name beside it, ending in .md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import warnings
from collections.abc import Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from attention_transfer.errors import UserError
from attention_transfer.run_folder import replacing, write_json
from attention_transfer.runtime.environment import environment
from attention_transfer.runtime.options import RuntimeOptions
from attention_transfer.runtime.resolve import resolve_runtime
from attention_transfer.taps import Stage, match_stages, stages, tap

STUDENT = "resnet18"
SECONDS = 300.0  # the time limit of a network
STEPS = ("traced", "read", "paired")
RANGES = ("stages", "pairs")
HEADINGS = ("family", "models", *STEPS, *RANGES)

Record = dict[str, Any]


def run(limit: int | None, console: Console, json_file: Path | None) -> None:
    """All networks of timm, or `limit` of them: a table by family, and the failures."""
    import timm

    every_name = timm.list_models()
    names = sample(every_name, limit)
    start = time.perf_counter()
    records: list[Record] = []
    with Examiner() as examiner, console.status("") as status:
        for name in names:
            status.update(f"{len(records)} of {len(names)}: {name}")
            records.append({"name": name, "family": family(name), **examiner.examine(name)})
    rows = summarize(records)
    failures = []
    table = Table(*HEADINGS, title="Networks of timm as teachers", title_justify="left")
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)
    for record in records:
        if record["reason"]:
            console.out(f"{record['name']}: {record['reason']}", highlight=False)
            failures.append({key: record[key] for key in ("name", "family", "reason", *STEPS)})
    if json_file is None:
        return
    result = {
        "bench": "zoo",
        "date": date.today().isoformat(),
        **environment(resolve_runtime(RuntimeOptions(device="cpu"))),
        "student": STUDENT,
        "of": len(every_name),
        "seconds": time.perf_counter() - start,
        "rows": rows,
        "failures": failures,
    }
    write_json(json_file, result)
    page = json_file.with_suffix(".md")
    with replacing(page) as partial:
        partial.write_text(markdown(result))
    console.out(f"written: {json_file}, {page}", highlight=False)


def sample(names: Sequence[str], limit: int | None) -> list[str]:
    """`limit` of the names at equal distances in the list; without a limit all of them."""
    if limit is None or limit >= len(names):
        return list(names)
    if limit < 1:
        raise UserError(f"--limit is {limit}: expected at least 1")
    return [names[i * len(names) // limit] for i in range(limit)]


def family(name: str) -> str:
    """The file of timm that defines a network."""
    from timm.models import model_entrypoint

    return model_entrypoint(name).__module__.rpartition(".")[2]


def examine(name: str) -> Record:
    """{traced, read, paired, stages, pairs, reason} of a teacher on images of its own size."""
    record = failure(None)
    try:
        model, x = _on_meta(name)
        teacher_stages = stages(model, x)
        record |= {"traced": True, "stages": len(teacher_stages)}
        expected = [stage.shape for stage in teacher_stages]
        with torch.no_grad(), tap(model, [stage.name for stage in teacher_stages]) as tapped:
            shapes = [tuple(features.shape) for features in tapped(x)[1].values()]
        if shapes != expected:
            raise UserError(f"tap reads {shapes}, stages() says {expected}")
        record["read"] = True
        pairs = match_stages(_student_stages(*x.shape[2:]), teacher_stages)
        record |= {"pairs": len(pairs), "paired": True}
    except Exception as error:
        record["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return record


def failure(reason: str | None) -> Record:
    return {**dict.fromkeys(STEPS, False), "stages": 0, "pairs": 0, "reason": reason}


def _on_meta(name: str) -> tuple[nn.Module, Tensor]:
    """A network without weights, in eval mode, and two of its images."""
    import timm

    with torch.device("meta"):
        model: Any = timm.create_model(name, pretrained=False).eval()
        return model, torch.zeros(2, *model.pretrained_cfg["input_size"])


@cache
def _student_stages(height: int, width: int) -> list[Stage]:
    return stages(_on_meta(STUDENT)[0], torch.zeros(2, 3, height, width, device="meta"))


def summarize(records: Sequence[Record]) -> list[Record]:
    """A row for each family, in alphabetical order, and the row `all`."""
    rows = []
    for name in sorted({record["family"] for record in records}):
        members = [record for record in records if record["family"] == name]
        rows.append(_summarize_one(name, members))
    return [*rows, _summarize_one("all", records)]


def _summarize_one(name: str, records: Sequence[Record]) -> Record:
    row: Record = {"name": name, "models": len(records)}
    for step in STEPS:
        row[step] = sum(record[step] for record in records)
    row["stages"] = sorted({record["stages"] for record in records if record["traced"]})
    row["pairs"] = sorted({record["pairs"] for record in records if record["paired"]})
    return row


def _cells(row: Record) -> list[str]:
    cells = [row["name"], str(row["models"]), *(str(row[step]) for step in STEPS)]
    for key in RANGES:
        ends = [str(count) for count in row[key][:1] + row[key][1:][-1:]]
        cells.append("–".join(ends))
    return cells


def markdown(result: Record) -> str:
    """The page of a run: what was counted, on what, the table and the failures."""
    total = result["rows"][-1]
    share = f"all {result['of']} of them"
    if total["models"] < result["of"]:
        share = f"{total['models']} of {result['of']}, at equal distances in the list"
    arguments = " ".join(result["command"][1:])
    lines = [
        "# Which networks of timm can be a teacher",
        "",
        f"Networks of timm {result['versions']['timm']}, {share}. `stages` finds the stages of "
        f"{total['traced']} (*traced*). `tap` gives features of the shapes that `stages` says for "
        f"{total['read']} (*read*). {total['paired']} share a stride with {result['student']} on "
        "images of the same size (*paired*). *stages* and *pairs* are the fewest and the most in a "
        "network of the family.",
        "",
        f"`python bench/zoo.py {arguments}` · {result['date']} · commit {result['commit']} · "
        f"{result['seconds'] / 60:.1f} minutes on a shared core of {result['hardware']['cpu']}",
        "",
        "Each at its default input size, batch 2, on the meta device: shapes, not values.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---" * len(HEADINGS) + "|",
    ]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in result["rows"]]
    lines += ["", "## What fails", ""]
    lines += [f"- `{f['name']}`: {f['reason']}" for f in result["failures"]] or ["Nothing."]
    return "\n".join(lines) + "\n"


class Examiner:
    """`examine` in a subprocess, replaced when a network exceeds the time limit or crashes it."""

    def __init__(self, seconds: float = SECONDS):
        self.seconds = seconds
        self.process: Any = None

    def examine(self, name: str) -> Record:
        if self.process is None:
            self._start()
        self.pipe.send(name)
        try:
            if self.pipe.poll(self.seconds):
                return self.pipe.recv()
            reason = f"took longer than {self.seconds:g} s"
        except (EOFError, ConnectionError):
            self.process.join()
            reason = f"ended its process (status {self.process.exitcode})"
        self._stop()
        return failure(reason)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=_serve, args=(child_pipe,), daemon=True)
        self.process.start()
        child_pipe.close()  # otherwise `recv` would wait for a process that died
        self.pipe.recv()  # the imports do not count towards the time limit

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def __enter__(self) -> Examiner:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()


def _serve(pipe: Any) -> None:
    import timm  # noqa: F401

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pipe.send(None)
    while True:
        pipe.send(examine(pipe.recv()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="Write the table to this file, and a page.")
    parser.add_argument("--limit", type=int, help="Number of networks. [all]")
    arguments = parser.parse_args()
    run(arguments.limit, Console(), arguments.json)


if __name__ == "__main__":
    main()
