"""CUDA graphs: which runs may use them, that every step is one, and that numbers stay the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_runs import STEPS_PER_EPOCH, carry_out, distilled, rows, small

from attention_transfer.errors import UserError
from attention_transfer.runtime import cuda_graphs, resolve
from attention_transfer.train import run

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_what_cannot_have_them():
    with pytest.raises(
        UserError,
        match="--compile graphs: CUDA graphs need a GPU, .*cpu: choose --compile on",
    ):
        resolve.resolve_runtime(small(device="cpu", compile="graphs"), 0.0)
    assert cuda_graphs.refusal("cuda", accumulate=1, processes=1) is None
    assert "--accumulate" in cuda_graphs.refusal("cuda", accumulate=2, processes=1)
    assert "processes" in cuda_graphs.refusal("cuda", accumulate=1, processes=2)
    # A run that had them and goes on elsewhere was not asked for them by name.
    assert not resolve.resolve_runtime(
        small(device="cpu", compile="auto"), 0.0, {"compile": True, "graphs": True}
    ).graphs


def test_what_the_compiler_is_told():
    eager = resolve.resolve_runtime(small(), 0.0)
    assert eager.compile_options() == {"dynamic": False}
    assert replace(eager, graphs=True).compile_options() == {
        "dynamic": False,
        "options": cuda_graphs.OPTIONS,
    }
    assert cuda_graphs.OPTIONS.keys() <= set(torch._inductor.list_options())


@pytest.mark.usefixtures("quick_runs")
def test_every_step_begins_one(teacher_run, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(
        run,
        "resolve_runtime",
        lambda *args, **options: replace(resolve.resolve_runtime(*args, **options), graphs=True),
    )
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    assert "CUDA graphs" in carry_out(distilled(teacher_run), tmp_path / "run")
    assert len(begun) == 2 * STEPS_PER_EPOCH


def test_parts_that_are_none_end_the_run(monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setitem(
        counters["inductor"], "cudagraph_skips", 1
    )  # of something else in this process
    begun, other = cuda_graphs.CudaGraphs(), cuda_graphs.CudaGraphs()
    begun.check()
    monkeypatch.setitem(counters["inductor"], "cudagraph_skips", 3)
    begun.check()  # looks at the first step alone
    with pytest.raises(
        UserError, match="--compile graphs: 2 compiled parts of a step cannot be CUDA graphs"
    ):
        other.check()


@needs_gpu
@pytest.mark.usefixtures("quick_runs")
@pytest.mark.parametrize(
    "options", [{}, {"clip_norm": 1.0, "ema": 0.9, "mixup": 0.2}, {"freeze_bn": True}]
)
def test_on_a_gpu(teacher_run, tmp_path, options):
    from torch._inductor import cudagraph_trees

    for mode in ("graphs", "off"):
        carry_out(distilled(teacher_run, device="cuda", compile=mode, **options), tmp_path / mode)
        if mode == "graphs":
            assert cudagraph_trees.get_manager(0).new_graph_id().id > 0  # something was recorded
    replayed, eager = rows(tmp_path / "graphs")[-1], rows(tmp_path / "off")[-1]
    assert replayed["train_loss"] == pytest.approx(eager["train_loss"], abs=0.02)
    assert replayed["parts"] == pytest.approx(eager["parts"], abs=0.02)
