"""Random flags, values and recipes end with 0, 1, 2 or 130, and a line that names their fault."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import check_command, contents, fuzz
from hypothesis import given
from hypothesis import strategies as st

from attention_transfer.commands import COMMANDS
from attention_transfer.config import Recipe, make_recipe
from attention_transfer.errors import UserError
from attention_transfer.options import OptionSpec, option_specs
from attention_transfer.run_folder import RunFolder

# Of these only the options are fuzzed: what they do takes minutes.
LONG = {
    "train": "attention_transfer.launch.run_seeds",
    "distill": "attention_transfer.launch.run_seeds",
    "teach": "attention_transfer.train.teach.teach",
    "demo": "attention_transfer.demo.run_demo",
    "bench": "attention_transfer.bench.run_bench",
    "reproduce": "attention_transfer.studies.reproduce.reproduce",
    "study": "attention_transfer.studies.study.run_study",
    "view": "attention_transfer.view.server.serve",
}
PLACES = (
    *("run", "teacher", "run/config.yaml", "run/student.safetensors", "run/summary.json"),
    *("photo.png", "photos", "mine.txt", "nowhere", "nowhere/x.json", "new.png", "new.html"),
    *("loop", "loop/x", "mine.txt/x", ".", "..", "/", "", " ", "\udcff.json", "new\nline.json"),
    *("a" * 300, "a" * 5000, "a/" * 2000, "~", "-", "--", "=", "new.json", "/dev/null/x"),
)
NAMES = (
    *("wrn-10-1", "wrn-16-2", "wrn-1000000-1", "wrn-10-999999", "wrn-11-1", "wrn-10-0", "wrn--1-1"),
    *("nin-thin", "nin-none", "timm/resnet18", "timm/", "timm/none", "torchvision/none", "net.py:"),
    *("net.py:make", "none.py:make", "run.py", "zoo:none", "zoo:", "hub:", "digits", "digits#x"),
    *("cifar10:nowhere", "folder:photos", "folder:", "folder:nowhere", "parquet:run", "wds:none"),
    *("at", "kd", "at+kd", "kd+at", "at+at", "none", "symmetry", "+", "at=1", "at=1,at=2", "at=x"),
    *("auto", "last2", "last0", "group0=group0", "=", "constant", "linear", "csv", "csv,csv", ","),
    *("1", "step", "cosine", "one-cycle", "imagenet", "sum", "gradient", "cpu", "step,epoch"),
)
NUMBERS = (
    *("0", "1", "2", "-1", "1.5", "1e3", "1e308", "-1e308", "1e-320", "nan", "inf", "-inf", "x"),
    *("9" * 20, "9" * 400, "9" * 5000, "0x10", "1_000", " 3 ", "1,2", "1,,2", "٣", "2**3", "1e400"),
    *(str(2**63 - 1), str(2**63), str(2**31), "60,120", "0.5", "0.08,1", "true", "on", "null"),
)
TEXT = st.text(st.characters(exclude_characters="\0"), max_size=12)
WORDS = st.one_of(st.sampled_from(PLACES), st.sampled_from(NAMES), st.sampled_from(NUMBERS), TEXT)


@pytest.fixture
def place(student_run, teacher_run, tmp_path, monkeypatch) -> Path:
    """A folder with runs, an image and a person's file, in which the commands are carried out."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    shutil.copytree(student_run, "run")
    shutil.copytree(teacher_run, "teacher")
    Path("photos").mkdir()
    for file in ("photo.png", "photos/a.png"):
        Image.new("RGB", (16, 16)).save(file)
    Path("mine.txt").write_text("mine")
    Path("loop").symlink_to("loop")
    for target in LONG.values():
        result = [RunFolder("run")] if target == LONG["train"] else []
        monkeypatch.setattr(target, lambda *_, result=result, **__: result)
    return tmp_path


@st.composite
def command_lines(draw: Any) -> tuple[str, list[str], set[str]]:
    """A command, its arguments and the options that are given."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    specs = [spec for group in COMMANDS[name].groups().values() for spec in group]
    words: list[str] = []
    given_options = set()
    for spec in specs:
        # What is required is mostly there, so that the rest is looked at, too.
        if not draw(st.integers(0, 19)) < (18 if spec.required else 60 // len(specs)):
            continue
        words += draw(option_words(spec))
        given_options.add(spec.key)
    if draw(st.integers(0, 9)) == 0:
        words.insert(draw(st.integers(0, len(words))), draw(WORDS))
    return name, words, given_options


@st.composite
def option_words(draw: Any, spec: OptionSpec) -> list[str]:
    if spec.kind is bool:
        flag = spec.flags[0]
        return [draw(st.sampled_from([flag, f"--no-{flag.removeprefix('--')}"]))]
    value = draw(values(spec))
    if spec.positional:
        more = draw(st.lists(WORDS, max_size=2)) if spec.kind is tuple else []
        return [value, *more]
    flag = draw(st.sampled_from(spec.flags))
    if draw(st.booleans()):
        return [f"{flag}={value}"]
    return [flag, value]


@st.composite
def values(draw: Any, spec: OptionSpec) -> str:
    """Mostly a value of the option's kind."""
    kinds = {int: NUMBERS, float: NUMBERS, Path: PLACES, str: NAMES}
    likely = [*spec.choices, *kinds.get(spec.kind, NAMES)]
    if draw(st.integers(0, 4)):
        return str(draw(st.sampled_from(likely)))
    return str(draw(WORDS))


@fuzz(60)
@given(line=command_lines())
def test_any_command_line(place, line):
    name, words, _ = line
    before = contents(place)
    names = [name, *words, *option_names(name)]
    # A word may stand in the message without its middle, its blanks or its odd characters.
    parts = {part[:12] for word in names for part in word.replace("=", " ").split()}
    parts |= {str(Path(part))[:12] for part in parts}  # `timm/` is the folder `timm`
    if any(word.endswith("=") or not word for word in words):
        parts |= {"''", "."}  # an empty path is this folder
    parts |= {repr(word)[1:-1] for word in words if word}
    status = check_command([name, *words], lambda error: any(part in error for part in parts))
    after = contents(place)
    outputs = set(after) - set(before)
    if status != 0:
        assert not {file for file in outputs if ".partial" in file}
    for file, content in before.items():
        original = file in ORIGINALS or file.startswith(("run/", "teacher/"))
        if original and after.get(file, b"") != content:
            assert "--force" in words, file
            if content is not None:
                Path(file).write_bytes(content)  # other commands find it as it was


ORIGINALS = ("photo.png", "photos/a.png", "mine.txt", "loop")


def option_names(command: str) -> list[str]:
    specs = [spec for group in COMMANDS[command].groups().values() for spec in group]
    return [word for spec in specs for word in (spec.key, spec.key.upper(), *spec.flags)]


KEYS = sorted(option_specs(Recipe))
PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), WORDS, st.sampled_from([10**400, -1])
)
TREES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | PLAIN, inner, max_size=3),
    max_leaves=6,
)
RECIPES = st.dictionaries(st.sampled_from(KEYS) | WORDS | PLAIN, TREES, max_size=6)


@fuzz(60)
@given(recipe=RECIPES, command=st.sampled_from(["train", "distill"]))
def test_any_recipe_file(place, recipe, command):
    text = yaml.safe_dump(recipe, allow_unicode=True)
    Path("r.yaml").write_text(text, errors="surrogatepass")
    words = [command, "--config", "r.yaml", "--out", "out"]
    check_command(words, lambda error: "r.yaml" in error or any(k in error for k in named(recipe)))


def named(recipe: dict[Any, Any]) -> list[str]:
    keys = [str(key) for key in recipe]
    flags = [f"--{key.replace('_', '-')}" for key in KEYS]
    return [*(repr(key)[1:9] for key in keys), *KEYS, *flags]


@fuzz(60)
@given(content=st.binary(max_size=60) | st.text("[]{}:-,&*!? \n\t'\"#|>%@`a1", max_size=60))
def test_any_text_as_a_recipe_file(place, content):
    file = Path("r.yaml")
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    check_command(["train", "--config", "r.yaml", "--model", "wrn-10-1", "--out", "out"])


@fuzz(60)
@given(options=RECIPES)
def test_any_options_in_python(options):
    try:
        recipe = make_recipe({"model": "wrn-10-1"}, options)
    except UserError:
        return
    # A file of options cannot hold the permission to execute code.
    assert make_recipe(recipe.to_dict()) == replace(recipe, trust_code=False)
