"""What the fuzzers share: how many examples they draw, and what a command may do with any input."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from attention_transfer import cli

EXAMPLES = int(os.environ.get("ATTENTION_TRANSFER_FUZZ", "0"))  # 0: a few, always the same ones
SECONDS = 10
TRAINING_SECONDS = 60  # for a command that trains and writes a report
WALL_SECONDS = 120  # for what waits and does not work; the machine may be busy
STATUSES = (0, 1, 2, 130)
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


def fuzz(few: int = 25, share: float = 1.0) -> Any:
    """The settings of a fuzzer: the same `few` examples, or as many as ATTENTION_TRANSFER_FUZZ.

    `share` of them, where an example takes long.
    """
    return settings(
        max_examples=max(1, round(EXAMPLES * share)) if EXAMPLES else few,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


class Hang(BaseException):
    """No `except Exception` of a command stops it."""


@contextmanager
def no_hang(seconds: int = SECONDS) -> Iterator[None]:
    """Raises `Hang` in a block that works for some seconds, or waits for two minutes."""

    def stop(*_: Any) -> None:
        raise Hang(f"no end after {seconds} s")

    timers = {signal.ITIMER_PROF: seconds, signal.ITIMER_REAL: WALL_SECONDS}
    handlers = [signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)]
    for timer, limit in timers.items():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), handlers, strict=True):
            signal.signal(number, handler)


def carry_out(words: list[str], seconds: int = SECONDS) -> tuple[int, str, str]:
    """Status, standard output and standard error of a command in this process."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2)]
    status = 0
    with no_hang(seconds), redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        try:
            cli.main(words)
        except SystemExit as leaving:
            status = int(leaving.code or 0)
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    return status, texts[0], texts[1]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its content; None for a link, a pipe or a device."""
    found: dict[str, bytes | None] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            plain = path.is_file() and not path.is_symlink()
            found[str(path.relative_to(folder))] = path.read_bytes() if plain else None
    return found


def changed_files(before: dict[str, bytes | None], after: dict[str, bytes | None]) -> set[str]:
    """The files that were written, made or removed between two results of `contents`."""
    return {f for f in before.keys() | after.keys() if before.get(f, b"") != after.get(f, b"")}


def check_command(words: list[str], names: Callable[[str], bool] = bool) -> int:
    """Carries out a command and checks how it ends; returns its status.

    Args:
        names: whether an error names what is wrong.
    """
    seconds = TRAINING_SECONDS if words[0] in ("train", "distill", "teach") else SECONDS
    status, out, err = carry_out(words, seconds)
    shown = f"{words!r} -> {status}: {err[-600:]}"
    assert status in STATUSES, shown
    assert "Traceback" not in out + err, shown
    # This is how a command ends that met an error of which nothing is known.
    assert "ATTENTION_TRANSFER_TRACEBACK" not in err, shown
    if status in (1, 2):
        lines = [line for line in err.splitlines() if line.startswith("attention-transfer: ")]
        assert len(lines) == 1, shown
        assert names(lines[0]), f"nothing is named: {shown}"
    sys.stdout.flush()
    return status


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
