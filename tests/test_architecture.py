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
# The package's own doors name everything, lazily.
ENTRANCES = {Path("__init__.py"), Path("__main__.py")}
INSIDE = [file for file in FILES if file not in ENTRANCES]
LEAVES = {"data", "models"}
CORE = {"taps", "methods", "transfer", "maps", "ops", "second_order"}
# The only files that know the whole recipe.
KNOW_THE_RECIPE = {
    f"train/{name}.py" for name in ("run", "resume", "assemble", "open_store", "announce", "finish")
}
LONGEST_FILE, LONGEST_FUNCTION, MOST_NAMES_IMPORTED = 400, 60, 27


def floors() -> dict[str, int]:
    """{unit: floor} of the table: a room, a file of the top level, or the options of any room."""
    by_unit = {}
    for floor, where in re.findall(
        r"^\| (\d+) \| `([^`]+)` \|", DOCUMENT.read_text(), re.MULTILINE
    ):
        unit = (
            "options of a room" if where == "*/options.py" else where.removesuffix(".py").strip("/")
        )
        by_unit[unit] = int(floor)
    return by_unit


FLOORS = floors()


def unit_of(parts: tuple[str, ...]) -> str:
    """The unit of a dotted path below the package."""
    if len(parts) > 1 and parts[1] == "options":
        return "options of a room"
    return parts[0]


def module_parts(file: Path) -> tuple[str, ...]:
    return file.with_suffix("").parts


def tree_of(file: Path) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text())


def imports(file: Path) -> Iterator[tuple[tuple[str, ...], int]]:
    """The modules that a file imports of the package, inside functions too, with the line."""
    package = ("attention_transfer", *file.parts[:-1])
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            paths = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module or "").split(".")) if node.module else base
            paths = [(*module, alias.name) for alias in node.names]
        else:
            continue
        for path in paths:
            if path[0] == "attention_transfer" and len(path) > 1:
                yield path[1:], node.lineno


def units(file: Path) -> set[str]:
    return {unit_of(parts) for parts, _ in imports(file)}


def third_party(file: Path) -> set[str]:
    """The packages that a file imports from outside, wherever in it."""
    names = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.partition(".")[0])
    return names


def in_room(*rooms: str) -> list[Path]:
    return [file for file in INSIDE if module_parts(file)[0] in rooms]


def test_every_file_has_a_floor():
    known = {unit_of(module_parts(file)) for file in INSIDE}
    assert known - FLOORS.keys() == set(), "add it to the table of docs/architecture.md"
    assert FLOORS.keys() - known == set(), "the table names what does not exist"


@pytest.mark.parametrize("file", INSIDE, ids=str)
def test_imports_go_down(file):
    mine = unit_of(module_parts(file))
    room = module_parts(file)[0]
    for parts, line in imports(file):
        unit = unit_of(parts)
        if unit == mine or parts[0] == "__version__":
            continue
        if parts[0] == room and mine != "options of a room":
            continue
        assert unit in FLOORS, f"{file}:{line} imports {unit}, which has no floor in the document"
        allowed = FLOORS[unit] < FLOORS[mine] or FLOORS[mine] == 0
        assert allowed, f"{file}:{line}: {mine} ({FLOORS[mine]}) imports {unit} ({FLOORS[unit]})"


def test_the_walk_sees_every_way_to_import():
    assert units(Path("transfer.py")) >= {"errors", "methods", "taps"}
    assert "run_folder" in units(Path("models/network.py"))
    assert "methods" in units(Path("config.py"))  # inside a function
    assert "options of a room" in units(Path("config.py"))
    assert "maps" in units(Path("methods/activation.py"))


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_the_side_leaves_import_only_the_ground(leaf):
    ground = {unit for unit, floor in FLOORS.items() if floor == 0} | {"options of a room"}
    for file in in_room(leaf):
        assert units(file) - {leaf} <= ground, file


@pytest.mark.parametrize("file", in_room(*CORE), ids=str)
def test_the_core_knows_no_network_data_optimiser_or_run(file):
    assert not units(file) & {"models", "data", "train", "run_folder", "config", "report", "cli"}
    assert "torch.optim" not in (PACKAGE / file).read_text()


@pytest.mark.parametrize("file", in_room("report"), ids=str)
def test_the_report_needs_no_torch_and_no_model_code(file):
    assert not third_party(file) & {"torch", "torchvision", "timm", "lightning"}
    allowed = {"report", "errors", "run_folder", "run_schema", "authors_log", "stats", "trust"}
    allowed |= {"__version__"}
    # The options say which of them change numbers, and what their defaults are.
    assert units(file) <= allowed | {"config", "options", "options of a room"}


@pytest.mark.parametrize("file", [f for f in INSIDE if f.stem == "options"], ids=str)
def test_options_need_no_torch(file):
    assert third_party(file) <= {"pydantic", *sys.stdlib_module_names}


@pytest.mark.parametrize("file", in_room("train", "apply", "checks", "runtime"), ids=str)
def test_only_what_puts_a_run_together_knows_the_recipe(file):
    assert "config" not in units(file) or str(file) in KNOW_THE_RECIPE


def test_the_trainer_knows_no_method_by_name():
    classes = {"ActivationTransfer", "KnowledgeDistillation"}
    for file in in_room("train"):
        names = {node.id for node in ast.walk(tree_of(file)) if isinstance(node, ast.Name)}
        assert not names & classes, file


@pytest.mark.parametrize("file", FILES, ids=str)
def test_files_functions_and_lists_of_imports_are_short(file):
    tree = tree_of(file)
    assert len((PACKAGE / file).read_text().splitlines()) <= LONGEST_FILE
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines"
    imported = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
    names = sum(len(node.names) for node in imported)
    assert file in ENTRANCES or names <= MOST_NAMES_IMPORTED


def modules_after(statement: str) -> set[str]:
    """The modules that `statement` loads."""
    code = f"import sys; before = set(sys.modules); {statement}; print(*{{*sys.modules}} - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def packages_after(statement: str) -> set[str]:
    """The top-level packages outside the standard library that `statement` loads."""
    packages = {module.partition(".")[0] for module in modules_after(statement)}
    return packages - set(sys.stdlib_module_names) - {"attention_transfer"}


def test_import_loads_nothing_third_party():
    assert packages_after("import attention_transfer") == set()
    use = "import attention_transfer as at; dir(at); at.__version__; at.UserError"
    assert packages_after(use) == set()


def test_the_report_loads_no_torch():
    use = "import attention_transfer.report; from attention_transfer.report import read_run"
    assert "torch" not in packages_after(use)


def test_evaluating_loads_no_trainer():
    rooms = "evaluate", "predict", "maps", "stages", "export"
    loaded = modules_after(";".join(f"import attention_transfer.apply.{room}" for room in rooms))
    assert not {module for module in loaded if module.startswith("attention_transfer.train")}


def test_public_names_resolve():
    for name in attention_transfer.__all__:
        assert getattr(attention_transfer, name) is not None
    assert set(attention_transfer.__all__) <= set(dir(attention_transfer))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        attention_transfer.nonsense  # noqa: B018


def test_preflight_is_the_function_whatever_was_imported():
    use = "import attention_transfer.checks.preflight, attention_transfer as at"
    use += "; print(at.preflight.__name__)"
    done = subprocess.run([sys.executable, "-c", use], capture_output=True, text=True, check=True)
    assert done.stdout == "preflight\n"
