"""`--teacher-kind attention` and `--kind attention` in the commands, with a small transformer."""

from __future__ import annotations

import json

import numpy as np
import pytest
from small_runs import carry_out, small, write_folder

from attention_transfer.store.store import TeacherStore

NETWORKS = """
import timm
from torch import nn

def teacher(num_classes):
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=3,
        num_classes=num_classes,
    )

def student(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )
"""
LINE = (
    "distill --teacher teacher --trust-code --student nets.py:student --method at --teacher-kind "
    "attention --data folder:data --image-size 32 --epochs 2 --batch-size 8 --device cpu "
    "--precision fp32 --compile off"
)


@pytest.fixture
def place(tmp_path, quick_runs):
    """Images in files, and a teacher; the working folder of `command`."""
    data = write_folder(tmp_path / "data", classes=3, train=8, val=2, size=32)
    options = {"data": f"folder:{data}", "limit_train": None, "limit_val": None, "batch_size": 8}
    (tmp_path / "nets.py").write_text(NETWORKS)
    model = f"{tmp_path / 'nets.py'}:teacher"
    carry_out(small(model=model, epochs=1, **options), tmp_path / "teacher")
    return tmp_path


def test_distill_and_maps(place, command):
    said = command(f"{LINE} --out run")
    assert said.status == 0, said.err
    assert "teacher_kind: attention" in (place / "run" / "config.yaml").read_text()
    row = json.loads((place / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["parts"]["at"] > 0 and "beta[3=blocks.1]" in row["weights"]

    said = command(
        "maps teacher run --images folder:data --kind attention --out maps.png --limit 2 "
        "--trust-code"
    )
    assert said.status == 0, said.err
    assert "run has no attention layers: its maps are of kind sum" in said.out
    assert "teacher has no attention" not in said.out


def test_the_report_shows_the_attention_that_was_taught(place, command):
    assert command(f"{LINE} --out run").status == 0
    with np.load(place / "run" / "maps.npz") as maps:
        taught = maps["teacher.map.0"]
    assert taught.shape[1:] == (4, 4)
    said = command(f"{LINE.replace('--teacher-kind attention', '')} --out sums")
    assert said.status == 0, said.err
    with np.load(place / "sums" / "maps.npz") as maps:
        assert not np.array_equal(taught, maps["teacher.map.0"])


def test_teach_keeps_it_for_a_student(place, command):
    machine = "--device cpu --precision fp32 --compile off"
    said = command(
        "teach --teacher teacher --trust-code --data folder:data --image-size 32 --views 2 "
        f"--kind attention {machine} --out store"
    )
    assert said.status == 0, said.err
    names = [entry.name for entry in TeacherStore(place / "store").header.arrays]
    assert names == ["logits", "blocks.1.attention"]
    said = command(f"{LINE.replace('--teacher teacher', '--teacher store')} --out run")
    assert said.status == 0, said.err
    refused = LINE.replace("--teacher teacher", "--teacher store")
    said = command(f"{refused.replace('--teacher-kind attention', '')} --out other")
    assert said.status == 2 and "blocks.1.attention" in said.err


def test_a_run_fills_its_store_and_reads_it(place, command):
    line = f"{LINE} --views 2 --store kept"
    for name in ("first", "second"):
        said = command(f"{line} --out {name}")
        assert said.status == 0, said.err
    rows = []
    for name in ("first", "second"):
        lines = (place / name / "metrics.jsonl").read_text().splitlines()
        rows.append([json.loads(line)["parts"] for line in lines])
    assert rows[0] == rows[1]


def test_a_network_without_attention_is_refused_in_words(place, command):
    line = LINE.replace("--teacher teacher", "--teacher run")
    assert command(f"{LINE} --out run").status == 0
    said = command(f"{line} --out refused")
    assert said.status == 2 and "has no attention that can be read" in said.err
