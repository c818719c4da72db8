"""The worked examples of CONTRIBUTING.md apply to the package and do what the page says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DIFFS = re.findall(r"^```diff\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
FILES = ("README.md", "tests/toys.py", "tests/test_docs.py", "tests/methods/test_contract.py")

CHECK = """
import attention_transfer as at
from attention_transfer import config
from attention_transfer.methods.registry import METHODS, method_arguments
from attention_transfer.options import option_specs
from attention_transfer.train.optimizer import make_optimizer

assert "--adam-beta2" in option_specs(config.Recipe)["adam_beta2"].flags
student = {"model": "wrn-10-1"}
recipe = config.make_recipe(student, {"optimizer": "adamw", "adam-beta2": "0.95"})
optimizer = make_optimizer(recipe, at.Transfer(at.create_model("wrn-10-1", 10)))
assert optimizer.defaults["betas"] == (0.9, 0.95)
assert config.make_recipe(recipe.to_dict()).adam_beta2 == 0.95
try:
    config.make_recipe(student, {"adam_beta2": 2})
except at.UserError as error:
    assert str(error) == "adam_beta2 is 2: expected a number ≥ 0 and < 1", error
else:
    raise AssertionError("2 is accepted")

assert METHODS["logits"].name == "logits"
options = {"teacher": "runs/teacher", "method": "at+logits", "beta": "at=1000,logits=0.5"}
recipe = config.make_recipe(student, options, {"command": "distill"})
assert method_arguments(recipe)["logits"]["beta"] == 0.5
"""


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> Path:
    """A copy of the package with both diffs applied."""
    copy = tmp_path_factory.mktemp("contributing")
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, copy / file)
    for diff in DIFFS:
        run("git", "apply", "-", cwd=copy, text=diff)
    return copy


def run(*command: str, cwd: Path, text: str = "") -> str:
    environment = os.environ | {
        "PYTHONPATH": f"{cwd / 'src'}{os.pathsep}{cwd / 'tests'}",
        "GIT_CEILING_DIRECTORIES": str(cwd.parent),  # git apply skips files of a repository around
    }
    done = subprocess.run(
        command, cwd=cwd, input=text, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_one_diff_for_an_option_and_one_for_a_method():
    assert len(DIFFS) == 2


def test_option_and_method_are_there(changed):
    run(sys.executable, "-c", CHECK, cwd=changed)
    help_text = run(sys.executable, "-m", "attention_transfer", "train", "--help", cwd=changed)
    assert "--adam-beta2" in help_text


def test_the_method_passes_its_test_the_contract_and_its_page(changed):
    # Compiling is left out for time; the contract of the registered methods compiles.
    pytest_logits = (sys.executable, "-m", "pytest", "-q", "tests", "-k", "logits and not compiled")
    summary = run(*pytest_logits, cwd=changed).splitlines()[-1]
    assert int(summary.split(" passed")[0]) >= 9
