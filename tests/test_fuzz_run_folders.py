"""Damaged run folders: every command that reads one ends with a line that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fuzzing import check_command, contents, fuzz
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, 10**400, -(10**20), 1e308, -0.0, float("nan"), float("inf")]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["wrn-10-1", "none.py:make", "nowhere", "at+kd", "1", "\0", "../..", "a" * 300]
    ),
    st.lists(st.integers(0, 9), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
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


def damage(file: Path, kind: str, seed: int, value: Any) -> None:
    random = np.random.default_rng(seed)
    content = bytearray(file.read_bytes()) if file.is_file() else bytearray()
    if kind == "cut":
        content = content[: random.integers(0, len(content) + 1)]
    elif kind == "flip":
        for place in random.integers(0, max(1, len(content)), random.integers(1, 20)):
            if content:
                content[place] ^= 1 << random.integers(0, 8)
    elif kind == "replace":
        content = bytearray(random.bytes(random.integers(0, 200)))
    elif kind == "value":
        content = bytearray(with_value(file, random, value))
    file.unlink(missing_ok=True)
    if kind == "folder":
        file.mkdir()
    elif kind != "remove":
        file.write_bytes(content)


def with_value(file: Path, random: np.random.Generator, value: Any) -> bytes:
    """The content of a file with one of its values replaced or left out."""
    if file.suffix == ".yaml":
        return yaml.safe_dump(replaced(yaml.safe_load(file.read_text()), random, value)).encode()
    if file.suffix == ".json":
        return json.dumps(replaced(json.loads(file.read_text()), random, value)).encode()
    if file.suffix == ".jsonl":
        lines = file.read_text().splitlines()
        line = random.integers(0, len(lines))
        lines[line] = json.dumps(replaced(json.loads(lines[line]), random, value))
        return "\n".join(lines).encode()
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as content:
            about = json.loads(content.metadata()["attention_transfer"])
        about = json.dumps(replaced(about, random, value))
        save_file(load_file(file), file, {"attention_transfer": about})
        return file.read_bytes()
    with np.load(file) as content:
        arrays = dict(content)
    name = random.choice(sorted(arrays))
    arrays[name] = changed_array(arrays[name], random, value)
    np.savez_compressed(file, **{k: v for k, v in arrays.items() if v.dtype != object})
    return file.read_bytes()


def changed_array(array: np.ndarray, random: np.random.Generator, value: Any) -> np.ndarray:
    """An array of another shape or type, or with values that cannot be."""
    match random.integers(0, 6):
        case 0:
            return array.astype(str)
        case 1:
            return array[..., None]
        case 2:
            return array[:1]
        case 3 if array.dtype.kind != "U":
            return array.astype("float64") * np.nan
        case 4 if array.dtype.kind != "U":
            return -array.astype("int64") - 1
    try:
        return np.array(value)
    except (ValueError, OverflowError):
        return np.zeros(0)


def replaced(tree: Any, random: np.random.Generator, value: Any) -> Any:
    """A copy of a tree with `value` at a random place."""
    if isinstance(tree, (dict, list)) and len(tree) and random.random() < 0.9:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        key = keys[random.integers(0, len(keys))]
        if random.random() < 0.1:
            if isinstance(tree, dict):
                return {name: tree[name] for name in tree if name != key}
            return tree[:key] + tree[key + 1 :]
        changed = replaced(tree[key], random, value)
        if isinstance(tree, dict):
            return tree | {key: changed}
        return [*tree[:key], changed, *tree[key + 1 :]]
    return value


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
    changed = {f for f in before.keys() | after.keys() if before.get(f, b"") != after.get(f, b"")}
    assert not {file for file in changed if not file.startswith(writes)}, (line, status)


@fuzz(40)
@given(line=st.sampled_from(READING), injury=damages())
def test_reading_a_damaged_run(place, line, injury):
    check(place, line, injury)


@fuzz(10, share=0.1)
@given(line=st.sampled_from(WRITING), injury=damages(), finished=st.booleans())
def test_training_beside_a_damaged_run(place, line, injury, finished):
    check(place, line, injury, finished)
