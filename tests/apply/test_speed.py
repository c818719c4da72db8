"""Speeds measured for a comparison."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from attention_transfer.apply import speed


@pytest.fixture
def calls(monkeypatch):
    """The names of the networks in the order in which they are timed."""
    timed = []

    def record(model, images):
        timed.append((id(model), len(images)))
        return 0.1

    monkeypatch.setattr(speed, "_seconds", record)
    monkeypatch.setattr(speed, "ROUNDS", 2)
    return timed


def test_each_distinct_network_is_measured_once_a_round_in_turn(calls, teacher_run, tmp_path):
    twin, other, unfinished = tmp_path / "twin", tmp_path / "other", tmp_path / "unfinished"
    shutil.copytree(teacher_run, twin)
    shutil.copytree(teacher_run, other)
    environment = json.loads((other / "environment.json").read_text())
    precision = environment["auto"]["precision"]
    environment["auto"]["precision"] = "fp32" if precision == "bf16" else "bf16"
    (other / "environment.json").write_text(json.dumps(environment))
    shutil.copytree(teacher_run, unfinished)
    (unfinished / "student.safetensors").unlink()
    measured = speed.measure_speeds([teacher_run, twin, other, unfinished], "cpu")
    assert measured.keys() == {teacher_run, twin, other}
    assert measured[teacher_run] == measured[twin]
    assert {measured[run]["precision"] for run in (twin, other)} == {"fp32", "bf16"}
    models = [model for model, count in calls if count == speed.BATCH]
    assert len(set(models)) == 2
    assert models == models[:2] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="memory is told by Linux only")
def test_the_peak_of_a_forward_pass_is_at_least_its_activations(calls, teacher_run):
    measured = speed.measure_speeds([teacher_run], "cpu")[teacher_run]
    # The first convolution's output alone: 128 images, 16 channels, 32 x 32, 2 bytes at least.
    assert measured["peak_mib"] >= 128 * 16 * 32 * 32 * 2 / 2**20


def test_compare_measures_where_it_is_asked(calls, command, teacher_run, student_run, tmp_path):
    said = command(f"compare {teacher_run} {student_run} --speed --device cpu --out r.html")
    assert (said.status, said.err) == (0, "")
    assert "1.3 k" in said.out  # 128 images in 0.1 s
    assert "measured for this page" in (tmp_path / "r.html").read_text()
    assert "1.3 k" not in command(f"compare {teacher_run} {student_run}").out
