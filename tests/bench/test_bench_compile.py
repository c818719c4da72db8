"""`bench compile`: its table and checks, and one whole run."""

import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import attention_transfer as at
from attention_transfer.bench import compile

RATES = {"off": 50.0, "on": 25.0, "auto": 40.0}


def fake_run(case):
    case.built = 3 if case.compile == "on" and case.earlier is None else 0
    case.compiled = case.compile == "on"
    return RATES[case.compile]


def test_the_table_and_the_checks(tmp_path, monkeypatch, small, read_rows):
    monkeypatch.setattr(compile, "measure_authors", lambda options, device: 100.0)
    monkeypatch.setattr(compile.CompileCase, "__call__", fake_run)
    compile.run(replace(small, steps=24), Console(quiet=True), tmp_path / "c.json")
    rows, result = read_rows(tmp_path / "c.json", "compile")
    kinds = ("off", "on first", "on second", "auto")
    long, short = ([f"{kind} {length}" for kind in kinds] for length in ("long", "short"))
    assert list(rows) == ["authors", *long, "authors short", *short]
    assert rows["on first long"]["times_off"] == 2
    assert rows["off long"]["seconds"] == pytest.approx(24 * 8 / 50)
    assert rows["auto short"]["times_off"] == pytest.approx(1.25)
    assert "auto short: did not compile, 1.25 of off's time: BEYOND 1.10" in result["notes"]
    assert "cache long: 3 files built by the first run, 0 by the second: reused" in result["notes"]


def test_a_case_is_a_whole_run(tmp_path, monkeypatch, small):
    torch.save(at.create_model("wrn-10-1", 10).state_dict(), tmp_path / "teacher.pt")
    case = compile.CompileCase("off", replace(small, steps=2), tmp_path)
    start = time.perf_counter()
    images_per_second = case()
    assert 2 * 8 / images_per_second <= time.perf_counter() - start
    assert case.built == 0 and not case.compiled
    monkeypatch.setattr(compile, "command_arguments", lambda *_: ["distil"])
    with pytest.raises(at.RunError, match=r"--compile off failed: .*unknown command 'distil'"):
        case()


def test_machine_code_is_counted(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/kernel.so", "a/kernel.cpp", "graph"):
        (tmp_path / name).touch()
    assert compile.count_machine_code(tmp_path) == 1
