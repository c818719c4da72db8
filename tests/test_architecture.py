"""The promises of docs/architecture.md: which file imports which, and what an import costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import attention_transfer

PACKAGE = Path(attention_transfer.__file__).parent
DOCUMENT = Path(__file__).parents[1] / "docs" / "architecture.md"
FILES = sorted(p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py"))
ENTRANCES = {"__init__", "__main__"}  # the package's own doors: they name everything, lazily
LEAVES = {"data", "models"}
ABOVE_THE_LEAVES = {"taps", "methods", "transfer", "maps", "ops"}


def floors() -> dict[str, int]:
    """{unit: floor} from the table of docs/architecture.md; a unit is a package or a file of the top level."""
    found = {}
    for floor, units in re.findall(r"^\| (\d+) \| ([^|]+) \|", DOCUMENT.read_text(), re.MULTILINE):
        found.update({unit: int(floor) for unit in re.findall(r"`(\w+)(?:/|\.py)`", units)})
    return found


def unit_of(file: Path) -> str:
    return file.parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """The units that a file imports, inside functions and under TYPE_CHECKING too, with the line."""
    here = ("attention_transfer", *file.parts[:-1])
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Import):
            targets = [(alias.name.split("."), ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level + 1]] if node.level else []
            targets = [
                (
                    [*base, *(node.module or "").split(".")] if node.module else base,
                    [a.name for a in node.names],
                )
            ]
        else:
            continue
        for path, names in targets:
            if path[0] != "attention_transfer":
                continue
            for unit in [path[1]] if len(path) > 1 else names:
                yield unit, node.lineno


def third_party(file: Path) -> set[str]:
    """The packages that a file imports from outside, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_every_file_has_a_floor():
    units = {unit_of(f) for f in FILES} - ENTRANCES
    assert units - floors().keys() == set(), "add it to the table of docs/architecture.md"


@pytest.mark.parametrize("file", [f for f in FILES if unit_of(f) not in ENTRANCES], ids=str)
def test_imports_go_down(file):
    known = floors()
    mine = unit_of(file)
    for unit, line in imports(file):
        if unit == mine or unit == "__version__":
            continue
        assert unit in known, (
            f"{file}:{line} imports {unit}, which has no floor in docs/architecture.md"
        )
        assert known[unit] < known[mine] or known[mine] == 0, (
            f"{file}:{line}: {mine} (floor {known[mine]}) imports {unit} (floor {known[unit]})"
        )


def test_the_walk_sees_every_way_to_import():
    assert {u for u, _ in imports(Path("transfer.py"))} >= {"errors", "methods", "taps"}
    assert "runs" in {u for u, _ in imports(Path("models/network.py"))}
    assert "methods" in {u for u, _ in imports(Path("recipe.py"))}  # inside a function
    assert "maps" in {u for u, _ in imports(Path("methods/activation.py"))}  # from .. import maps


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_the_side_leaves_import_only_the_ground(leaf):
    known = floors()
    for file in (f for f in FILES if unit_of(f) == leaf):
        assert {u for u, _ in imports(file)} - {leaf} <= {
            u for u, floor in known.items() if floor == 0
        }, file


@pytest.mark.parametrize("file", [f for f in FILES if unit_of(f) in ABOVE_THE_LEAVES], ids=str)
def test_the_core_knows_no_network_data_optimiser_or_run(file):
    assert not {u for u, _ in imports(file)} & {
        "models",
        "data",
        "engine",
        "runs",
        "recipe",
        "report",
        "cli",
    }
    assert "torch.optim" not in (PACKAGE / file).read_text()


@pytest.mark.parametrize("file", [f for f in FILES if unit_of(f) == "report"], ids=str)
def test_the_report_needs_no_torch_and_no_model_code(file):
    assert not third_party(file) & {"torch", "torchvision", "timm", "lightning"}
    assert {u for u, _ in imports(file)} <= {"report", "errors", "runs", "__version__"}


def test_the_engine_knows_no_method_by_name():
    for file in (f for f in FILES if unit_of(f) == "engine"):
        names = {
            n.id
            for n in ast.walk(ast.parse((PACKAGE / file).read_text()))
            if isinstance(n, ast.Name)
        }
        assert not names & {"ActivationTransfer", "KnowledgeDistillation"}, file


def modules_after(statement: str) -> set[str]:
    """The top-level packages outside the standard library that `statement` loads."""
    code = f"import sys; before = set(sys.modules); {statement}; print(*{{*sys.modules}} - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return (
        {m.partition(".")[0] for m in done.stdout.split()}
        - set(sys.stdlib_module_names)
        - {"attention_transfer"}
    )


def test_import_loads_nothing_third_party():
    assert modules_after("import attention_transfer") == set()
    assert (
        modules_after("import attention_transfer as at; dir(at); at.__version__; at.UserError")
        == set()
    )


def test_the_report_loads_no_torch():
    assert "torch" not in modules_after(
        "import attention_transfer.report; from attention_transfer.report import read_run"
    )


def test_public_names_resolve():
    for name in attention_transfer.__all__:
        assert getattr(attention_transfer, name) is not None
    assert set(attention_transfer.__all__) <= set(dir(attention_transfer))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        attention_transfer.nonsense  # noqa: B018


@pytest.mark.parametrize("package", ["models", "methods", "report", "data"])
def test_names_of_the_packages_resolve(package):
    module = __import__(f"attention_transfer.{package}", fromlist=["x"])
    for name in getattr(module, "__all__", []):
        assert getattr(module, name) is not None
