"""What others rely on: public names, flags, fields of a run's files, a line for a missing extra.

tests/compatibility.txt lists it. `python tests/test_compatibility.py` writes that file anew.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

import attention_transfer as at
from attention_transfer import run_schema
from attention_transfer.commands import COMMANDS
from attention_transfer.config import Recipe
from attention_transfer.flags import default_as_text
from attention_transfer.options import OptionSpec, option_specs
from attention_transfer.run_folder import RunFolder

FILE = Path(__file__).with_name("compatibility.txt")
FILES = {
    "config.yaml": run_schema.Config,
    "environment.json": run_schema.Environment,
    "metrics.jsonl": run_schema.MetricsRow,
    "summary.json": run_schema.Summary,
    "student.safetensors": run_schema.Metadata,
    "logs/state.json": run_schema.LoggerState,
}


def describe() -> str:
    """The content of compatibility.txt."""
    lines = ["# Public names", *public_names()]
    for name, command in COMMANDS.items():
        lines += ["", f"# Flags of {name}"]
        for specs in command.groups().values():
            lines += map(describe_flag, specs)
    lines += ["", "# Keys of a recipe", *sorted(option_specs(Recipe))]
    lines += ["", "# Files of a run folder", *run_files()]
    for file, schema in FILES.items():
        lines += ["", f"# Fields of {file} that are read", *fields(schema)]
    return "\n".join(lines) + "\n"


def public_names() -> Iterator[str]:
    for name in sorted(at.__all__):
        value = getattr(at, name)
        if not callable(value):
            yield name
            continue
        yield f"{name}{signature(value)}"
        if inspect.isclass(value) and not issubclass(value, Exception):
            for member, function in sorted(own_members(value).items()):
                if member.startswith("_"):
                    continue
                if inspect.isfunction(function):
                    yield f"    .{member}{signature(function)}"
                elif isinstance(function, property):
                    yield f"    .{member}"


def own_members(cls: type) -> dict[str, object]:
    """The members of a class and of its bases in this package."""
    members: dict[str, object] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("attention_transfer"):
            members |= vars(base)
    return members


def signature(function: object) -> str:
    """The parameters and their defaults; annotations may change their words."""
    assert callable(function)
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of an exception
        return ""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature([p for p in bare if p.name != "self"]))


def describe_flag(spec: OptionSpec) -> str:
    name = " ".join(spec.flags)
    if spec.positional:
        name = spec.key.upper()
    choices = ""
    if spec.choices:
        choices = " {" + ",".join(spec.choices) + "}"
    if spec.required:
        return f"{name}{choices} (required)"
    return f"{name}{choices} [{default_as_text(spec)}]"


def run_files() -> list[str]:
    folder = RunFolder("run")
    names = [name for name in dir(folder) if name.endswith("_file")]
    return sorted(str(getattr(folder, name).relative_to("run")) for name in names)


def fields(schema: type[BaseModel]) -> list[str]:
    return sorted(schema.model_fields)


def test_compatibility_txt_is_as_the_package_is():
    expected, actual = FILE.read_text().splitlines(), describe().splitlines()
    gone = [line for line in expected if line not in actual]
    new = [line for line in actual if line not in expected]
    advice = "if that is meant: python tests/test_compatibility.py"
    assert actual == expected, f"gone: {gone}; new: {new}; {advice}"


@pytest.mark.parametrize(
    ("package", "line", "words"),
    [
        (
            "tensorboard",
            "train --model nin --log tensorboard",
            "pip install 'attention-transfer[tensorboard]'",
        ),
        ("wandb", "train --model nin --log wandb", "pip install 'attention-transfer[wandb]'"),
        ("onnx", "export run --format onnx", "pip install 'attention-transfer[onnx]'"),
        ("onnxscript", "export run --format onnx", "pip install 'attention-transfer[onnx]'"),
        ("onnxruntime", "export run --format onnx", "pip install 'attention-transfer[onnx]'"),
    ],
)
def test_a_missing_extra_is_one_line(teacher_run, command, monkeypatch, package, line, words):
    Path("run").symlink_to(teacher_run)
    for name in (package, "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    said = command(f"{line} --out out")
    assert said.status == 2 and package in said.err and words in said.err
    assert said.err.count("\n") == 1 and not Path("out").exists()


if __name__ == "__main__":
    FILE.write_text(describe())
