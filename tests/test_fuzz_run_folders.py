"""Damaged run folders: every command that reads one ends with a line that names the file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from fuzzing import VALUES, changed_files, check_command, contents, damage, fuzz
from hypothesis import given
from hypothesis import strategies as st
from small_runs import FLAGS

TEXT_FILES = ("config.yaml", "environment.json", "metrics.jsonl", "summary.json", "logs/state.json")
BINARY_FILES = (
    "checkpoint.pt", "checkpoint-previous.pt", "student.safetensors", "maps.npz", "predictions.npz",
)  # fmt: skip
READING = (
    "evaluate run --limit-val 4 --device cpu",
    "predict run photo.png --device cpu",
    "export run --format safetensors --out new.safetensors",
    "export run --format authors --out new",
    "compare run",
    "compare run teacher --out new.html",
    "maps run --images photo.png --out new.png",
    "stages run",
)
WRITING = (
    "distill --config recipe.yaml --out run",
    f"distill --student wrn-10-1 --teacher run --method kd {FLAGS} --max-steps 1 --out new",
    f"train --model wrn-10-1 --student-weights run {FLAGS} --max-steps 1 --out new",
)


@pytest.fixture
def place(student_run, teacher_run, quick_runs, tmp_path, monkeypatch) -> Path:
    """A folder with a photograph, a teacher and the recipe of the run that is damaged."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("photo.png")
    shutil.copytree(teacher_run, "teacher")
    shutil.copytree(student_run, "whole")
    shutil.copy(student_run / "config.yaml", "recipe.yaml")
    (tmp_path / "whole" / "logs").mkdir()
    (tmp_path / "whole" / "logs" / "state.json").write_text('{"csv": {"step": 8, "id": null}}')
    return tmp_path


@st.composite
def damages(draw: Any) -> tuple[str, str, int, Any]:
    """The name of a file, how it is damaged, the seed of where, and the value that is put there."""
    name = draw(st.sampled_from(TEXT_FILES + BINARY_FILES))
    kinds = ["cut", "flip", "replace", "remove", "folder"]
    # The others hardly get beyond the first check of a format, so this comes more often.
    kinds += ["value"] * 8 * (not name.startswith("checkpoint"))
    kind = draw(st.sampled_from(kinds))
    seed = draw(st.integers(0, 10**9))
    value = draw(VALUES)
    return name, kind, seed, value


def check(place: Path, line: str, injury: tuple[str, str, int, Any], finished: bool = True) -> None:
    name, *how = injury
    shutil.rmtree("run", ignore_errors=True)
    shutil.rmtree("new", ignore_errors=True)
    for file in place.glob("new*"):
        file.unlink()
    shutil.copytree("whole", "run")
    damage(place / "run" / name, *how)
    if not finished and (place / "run" / "summary.json").is_file():
        (place / "run" / "summary.json").unlink()
    before = contents(place)
    words = line.split()
    known = ("run", name, "none.py", "nowhere", "recipe.yaml", "teacher")
    status = check_command(words, lambda error: any(word in error for word in known))
    after = contents(place)
    writes = ("new", "run/") if words[0] in ("train", "distill") else ("new",)
    changed = changed_files(before, after)
    assert not {file for file in changed if not file.startswith(writes)}, (line, status)


@fuzz(40)
@given(line=st.sampled_from(READING), injury=damages())
def test_reading_a_damaged_run(place, line, injury):
    check(place, line, injury)


@fuzz(10, share=0.1)
@given(line=st.sampled_from(WRITING), injury=damages(), finished=st.booleans())
def test_training_beside_a_damaged_run(place, line, injury, finished):
    check(place, line, injury, finished)
