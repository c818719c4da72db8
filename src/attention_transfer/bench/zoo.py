"""`bench zoo`: how many of timm's networks can be a teacher: whose stages are found, read, and pair with a ResNet-18.

Shapes are all that this takes, so networks and images are on PyTorch's meta device: no weights, no arithmetic. Each
network has a time limit, in a process that ends alone where a network crashes it.
"""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..errors import UserError
from ..run_folder import replacing, write_json
from ..taps import Stage, match_stages, stages, tap

STUDENT = "resnet18"
SECONDS = 300.0
STEPS = ("traced", "read", "paired")
RANGES = ("stages", "pairs")
HEADINGS = ("family", "models", *STEPS, *RANGES)


def bench_zoo(console: Console, file: Path | None, limit: int | None = None) -> None:
    """Every network of timm, or `limit` of them spread over the list; a table of families, and the failures.

    Args:
        console: where the table goes.
        file: where the JSON goes; the same as Markdown goes beside it.
        limit: so many networks.
    """
    import timm

    names = sample(timm.list_models(), limit)
    start = time.perf_counter()
    found: list[dict[str, Any]] = []
    with _Worker() as worker, console.status("") as status:
        for name in names:
            status.update(f"{len(found)} of {len(names)}: {name}")
            found.append({"name": name, "family": family(name), **worker.examine(name)})
    seconds = time.perf_counter() - start
    rows = [*summary(found), _row("all", found)]
    console.print(_table(rows))
    failures = [r for r in found if r["reason"]]
    for failure in failures:
        console.print(f"{failure['name']}: {failure['reason']}", markup=False, highlight=False)
    if file is None:
        return
    from ..config import Recipe
    from ..runtime.environment import environment
    from ..runtime.process import set_up_process
    from ..runtime.resolve import resolve_runtime

    about = {
        "bench": "zoo",
        "date": date.today().isoformat(),
        **environment(set_up_process(resolve_runtime(Recipe(device="cpu")))),
        "student": STUDENT,
        "of": len(timm.list_models()),
        "seconds": seconds,
        "rows": rows,
        "failures": [{k: r[k] for k in ("name", "family", "reason", *STEPS)} for r in failures],
    }
    del about["auto"]
    write_json(file, about)
    page = file.with_suffix(".md")
    with replacing(page) as partial:
        partial.write_text(markdown(about))
    console.print(f"written: {file}, {page}", markup=False, highlight=False, soft_wrap=True)


def sample(names: Sequence[str], limit: int | None) -> list[str]:
    """`limit` of the names at equal distances; all of them where there is no limit."""
    if limit is None or limit >= len(names):
        return list(names)
    if limit < 1:
        raise UserError(f"--limit is {limit}: expected at least 1")
    return [names[i * len(names) // limit] for i in range(limit)]


def family(name: str) -> str:
    """timm's file that a network is defined in."""
    from timm.models import model_entrypoint

    return model_entrypoint(name).__module__.rpartition(".")[2]


def examine(name: str) -> dict[str, Any]:
    """{traced, read, paired, stages, pairs, reason} of one network, as a teacher on images of its own size."""
    row: dict[str, Any] = {**dict.fromkeys(STEPS, False), "stages": 0, "pairs": 0, "reason": None}
    try:
        model, x = _on_meta(name)
        teacher = stages(model, x)
        row |= {"traced": True, "stages": len(teacher)}
        with torch.no_grad(), tap(model, [s.name for s in teacher]) as tapped:
            shapes = [tuple(f.shape) for f in tapped(x)[1].values()]
        if shapes != [s.shape for s in teacher]:
            raise UserError(f"tap reads {shapes}, stages() says {[s.shape for s in teacher]}")
        row["read"] = True
        row |= {"pairs": len(match_stages(_student_stages(*x.shape[2:]), teacher)), "paired": True}
    except Exception as error:
        row["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return row


def _on_meta(name: str) -> tuple[nn.Module, Tensor]:
    """A network without weights, in eval mode, and two of its images."""
    import timm

    with torch.device("meta"):
        model: Any = timm.create_model(name, pretrained=False).eval()
        return model, torch.zeros(2, *model.pretrained_cfg["input_size"])


@cache
def _student_stages(height: int, width: int) -> list[Stage]:
    return stages(_on_meta(STUDENT)[0], torch.zeros(2, 3, height, width, device="meta"))


def summary(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a family, in alphabetical order."""
    families = sorted({r["family"] for r in found})
    return [_row(f, [r for r in found if r["family"] == f]) for f in families]


def _row(name: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    counts = Counter(r["stages"] for r in found if r["traced"])
    return {
        "name": name,
        "models": len(found),
        **{step: sum(r[step] for r in found) for step in STEPS},
        "stages": sorted(counts),
        "pairs": sorted({r["pairs"] for r in found if r["paired"]}),
    }


def _cells(row: dict[str, Any]) -> list[str]:
    ranges = [
        "–".join(dict.fromkeys(str(n) for n in (row[k][0], row[k][-1]))) if row[k] else ""
        for k in RANGES
    ]
    return [row["name"], str(row["models"]), *(str(row[s]) for s in STEPS), *ranges]


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="bench zoo", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "family" else "right")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def markdown(about: dict[str, Any]) -> str:
    """The page of a run: what was counted, on what, the table and the failures."""
    rows, failures = about["rows"], about["failures"]
    total = rows[-1]
    share = f"all {about['of']}"
    if total["models"] < about["of"]:
        share = f"{total['models']} of the {about['of']}, at equal distances in the list,"
    lines = [
        "# Which networks of timm can be a teacher",
        "",
        f"Networks of timm {about['versions']['timm']}, {share} looked at: the stages of {total['traced']} are found "
        f"(*traced*), `tap` gives features of the shapes that `stages` says for {total['read']} (*read*), and "
        f"{total['paired']} have a stride in common with {about['student']} on images of the same size (*paired*). "
        "*stages* and *pairs*: how many there are in a network, from the fewest to the most.",
        "",
        f"`{' '.join(about['command'])}` · {about['date']} · commit {str(about['commit'])[:12]} · "
        f"{about['seconds'] / 60:.1f} minutes on a shared core of {about['hardware']['cpu']}",
        "",
        "Each at its default input size, batch 2, on the meta device: shapes, not values.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---" * len(HEADINGS) + "|",
        *("| " + " | ".join(_cells(row)) + " |" for row in rows),
        "",
        "## What fails",
        "",
        *(f"- `{f['name']}`: {f['reason']}" for f in failures),
        *([] if failures else ["Nothing."]),
    ]
    return "\n".join(lines) + "\n"


class _Worker:
    """`examine` in a process of its own, which is replaced when a network takes too long or ends it."""

    def __init__(self, seconds: float = SECONDS):
        self.seconds = seconds
        self.process: Any = None

    def examine(self, name: str) -> dict[str, Any]:
        if self.process is None:
            self._start()
        self.here.send(name)
        failed = {**dict.fromkeys(STEPS, False), "stages": 0, "pairs": 0}
        try:
            if self.here.poll(self.seconds):
                return self.here.recv()
            reason = f"took longer than {self.seconds:g} s"
        except (EOFError, ConnectionError):
            self.process.join()
            reason = f"ended its process (status {self.process.exitcode})"
        self._stop()
        return {**failed, "reason": reason}

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.here, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there,), daemon=True)
        self.process.start()
        there.close()  # so that a process that died is an end of file here, and not a wait
        self.here.recv()  # the imports are no part of a network's time

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def __enter__(self) -> _Worker:
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
