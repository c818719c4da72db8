"""CUDA graphs: who may have them, that every step of a run begins as one, and that they leave the numbers alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_runs import STEPS_PER_EPOCH, carry_out, distilled, rows, small

from attention_transfer.engine import decide, loop, run
from attention_transfer.errors import UserError

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_what_cannot_have_them():
    with pytest.raises(UserError, match="--compile graphs: CUDA graphs need a GPU, and the device is cpu: choose on"):
        decide.decide(small(device="cpu", compile="graphs"), 0.0)
    assert decide._no_graphs(small(), "cuda") is None
    assert "--accumulate" in decide._no_graphs(small(accumulate=2), "cuda")
    assert "processes" in decide._no_graphs(small(devices=2), "cuda")


def test_what_the_compiler_is_told():
    eager = decide.decide(small(), 0.0)
    assert eager.compile_options() == {"dynamic": False}
    assert replace(eager, graphs=True).compile_options() == {"dynamic": False, "mode": "reduce-overhead"}


@pytest.mark.usefixtures("quick_runs")
def test_every_step_begins_one(teacher_run, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(run, "decide", lambda *a: replace(decide.decide(*a), graphs=True))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    assert "CUDA graphs" in carry_out(distilled(teacher_run), tmp_path / "run")
    assert len(begun) == 2 * STEPS_PER_EPOCH


def test_parts_that_are_none_end_the_run(monkeypatch):
    from torch._dynamo.utils import counters

    loop.check_graphs()
    monkeypatch.setitem(counters["inductor"], "cudagraph_skips", 2)
    with pytest.raises(UserError, match="--compile graphs: 2 compiled parts of a step cannot be CUDA graphs"):
        loop.check_graphs()


@needs_gpu
@pytest.mark.usefixtures("quick_runs")
def test_on_a_gpu(teacher_run, tmp_path):
    for mode in ("graphs", "off"):
        carry_out(distilled(teacher_run, device="cuda", compile=mode), tmp_path / mode)
    graphs, eager = rows(tmp_path / "graphs")[-1], rows(tmp_path / "off")[-1]
    assert graphs["train_loss"] == pytest.approx(eager["train_loss"], abs=0.02)
    assert graphs["parts"] == pytest.approx(eager["parts"], abs=0.02)
