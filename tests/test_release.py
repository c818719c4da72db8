"""What is released: the files of wheel and sdist, one version, and the matrix of the public CI."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import attention_transfer

ROOT = Path(__file__).parents[1]
VERSION = attention_transfer.__version__
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOP_LEVEL = {"pyproject.toml", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile"}


def hatch(source: Path, target: str, out: Path) -> Path:
    """The wheel or sdist of a source tree; needs no network."""
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory"]
    subprocess.run([*command, str(out)], cwd=source, check=True, capture_output=True)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The sdist of the checkout, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(hatch(ROOT, "sdist", folder / "dist")) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"attention_transfer-{VERSION}"


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """The wheel that the sdist alone makes, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(hatch(sdist, "wheel", folder / "dist")) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def files_of(folder: Path) -> set[str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)) for p in paths if "__pycache__" not in p.parts}


def test_the_wheel_holds_every_file_of_the_package(wheel):
    source = files_of(ROOT / "src" / "attention_transfer")
    assert source >= {"py.typed", "ops/kernels.cpp", "recipes/cifar10-paper.yaml"}
    assert files_of(wheel / "attention_transfer") == source


def test_the_wheel_names_version_licence_command_and_dependencies(wheel):
    about = wheel / f"attention_transfer-{VERSION}.dist-info"
    metadata = (about / "METADATA").read_text()
    assert f"\nVersion: {VERSION}\n" in metadata
    assert "\nLicense-Expression: MIT\n" in metadata
    assert (about / "licenses" / "LICENSE").exists()
    assert (
        "attention-transfer = attention_transfer.cli:main"
        in (about / "entry_points.txt").read_text()
    )
    required = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.MULTILINE)
    assert sorted(required) == sorted(PROJECT["dependencies"])


def test_the_sdist_holds_tests_docs_and_results(sdist):
    assert files_of(sdist) >= TOP_LEVEL
    for folder in ("src", "tests", "docs", "results", "bench"):
        assert files_of(sdist / folder) == files_of(ROOT / folder), folder


def test_the_wheel_trains_outside_the_checkout(wheel, tmp_path):
    """Its recipes, its kernels and the templates of its report are found there."""
    environment = os.environ | {"PYTHONPATH": str(wheel)}
    line = "train --recipe digits-teacher --model wrn-10-1 --limit-train 64 --limit-val 20"
    line += " --epochs 1 --batch-size 32 --out run --device cpu --compile off"
    command = [sys.executable, "-m", "attention_transfer", *line.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "<html" in (tmp_path / "run" / "report.html").read_text()


def test_one_semantic_version_everywhere():
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", VERSION)
    assert re.search(rf"^## {re.escape(VERSION)}, ", (ROOT / "CHANGELOG.md").read_text(), re.M)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == VERSION
    assert citation["license"] == PROJECT["license"]


def test_both_the_paper_and_the_software_are_cited():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (paper,) = citation["references"]
    assert "Paying More Attention to Attention" in paper["title"]
    assert citation["title"] == PROJECT["name"] and citation["authors"]


def test_the_ci_tests_the_versions_that_the_package_allows():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if "Python :: 3." in c]
    assert matrix["python"] == named
    assert f">={named[0]}" == PROJECT["requires-python"]
    (oldest,) = matrix["include"]
    assert oldest["python"] == named[0]
    for required in oldest["versions"].split():
        assert required.replace("==", ">=").removesuffix(".*") in PROJECT["dependencies"]
    assert {"lint", "docs", "package"} <= jobs.keys()


def test_only_the_publishing_job_may_write_anything():
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(file.read_text())
        assert workflow["permissions"] == {"contents": "read"}, file
        for name, job in workflow["jobs"].items():
            if name != "publish":
                assert "permissions" not in job, f"{file}: {name}"
