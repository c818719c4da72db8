"""Creates networks from a user's Python file, with clear errors if its code fails."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UserError, nearest

MODULE_PREFIX = "attention_transfer_user_"  # for the names in sys.modules
THIS_FOLDER = Path(__file__).resolve().parent


def create_from_file(file: Path, factory: str, num_classes: int) -> nn.Module:
    """The module that the function `factory` of a file returns.

    Raises:
        UserError: for a missing file or function, a function that needs arguments other than
            `num_classes`, an error in the user's code, and a result that is not a module.
    """
    if not file.is_file():
        hint = nearest(file.name, [neighbour.name for neighbour in file.parent.glob("*.py")])
        raise UserError(
            f"no model file {file}: expected a Python file with the function {factory}{hint}"
        )
    # The file can import other files of its folder, as a script can.
    folder = str(file.parent.resolve())
    sys.path.insert(0, folder)
    try:
        make = _find_factory(_import_file(file), file, factory)
        arguments = _arguments(make, f"{file}:{factory}", num_classes)
        with _user_code(file):
            model = make(**arguments)
    finally:
        with contextlib.suppress(ValueError):  # the file may have changed sys.path
            sys.path.remove(folder)
    if isinstance(model, nn.Module):
        return model
    hint = ": is the return statement missing?" if model is None else ""
    raise UserError(
        f"{file}:{factory} returned a {type(model).__name__}: expected a torch.nn.Module{hint}"
    )


def public_functions(file: Path) -> list[str]:
    """The functions and classes of a Python file, without running it."""
    try:
        body = ast.parse(file.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return []
    # Calling a class also makes a module.
    names = [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [name for name in names if not name.startswith("_")]


def _import_file(file: Path) -> Any:
    # Two files may have the same name. Dataclasses and pickles look up their module in sys.modules.
    digest = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]
    name = f"{MODULE_PREFIX}{file.stem}_{digest}"
    loader = SourceFileLoader(name, str(file.absolute()))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        with _user_code(file):
            loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _find_factory(module: Any, file: Path, factory: str) -> Callable[..., Any]:
    make = getattr(module, factory, None)
    if callable(make):
        return make
    names = public_functions(file)
    hint = nearest(factory, names)
    if make is not None:
        kind = type(make).__name__
        raise UserError(f"{file}:{factory} is of type {kind}: expected a function{hint}")
    if names and not hint:
        hint = f" (it has {', '.join(names[:5])})"
    raise UserError(f"{file} has no function {factory!r}{hint}")


def _arguments(make: Callable[..., Any], name: str, num_classes: int) -> dict[str, int]:
    """`num_classes` if a factory takes it, else nothing; `UserError` if it needs others."""
    arguments = {"num_classes": num_classes}
    try:
        signature = inspect.signature(make)
        signature.bind(**arguments)
    except ValueError:  # functions that are not written in Python have no signature
        return arguments
    except TypeError as error:
        with contextlib.suppress(TypeError):
            signature.bind()
            return {}
        raise UserError(
            f"{name} cannot be called, {error}: expected a function that can be called with "
            "num_classes=N only, or without arguments"
        ) from error
    return arguments


@contextlib.contextmanager
def _user_code(file: Path) -> Iterator[None]:
    """Turns an error of the user's code inside the block into a `UserError` with file and line."""
    try:
        yield
    except (Exception, SystemExit) as error:  # a file may call sys.exit
        source, line = _location(error, file.resolve().parent) or (file.resolve(), None)
        message = str(error)
        if isinstance(error, SyntaxError) and error.filename is not None:
            source, line, message = Path(error.filename).resolve(), error.lineno, error.msg
        # The folder as the user typed it, also for other files in it.
        shown = str(file if source == file.resolve() else file.parent / source.name)
        if line is not None:
            shown += f", line {line}"
        message = " ".join(message.split())[:300]
        reason = f"{type(error).__name__}: {message}".removesuffix(": ")
        raise UserError(f"{shown}: {reason}") from error


def user_code_location(error: BaseException) -> str:
    """` (FILE, line N)` of an error in a user's model file; empty for any other error."""
    for name, module in list(sys.modules.items()):
        if name.startswith(MODULE_PREFIX) and module.__file__:
            location = _location(error, Path(module.__file__).resolve().parent)
            if location is not None:
                return f" ({location[0].name}, line {location[1]})"
    return ""


def _location(error: BaseException, folder: Path) -> tuple[Path, int | None] | None:
    """File and line of the innermost frame in the files of `folder`."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename).resolve()
        # The user's folder may contain this package, or an environment of installed packages.
        installed = file.parent == THIS_FOLDER or "site-packages" in file.parts
        if file.is_relative_to(folder) and not installed:
            return file, frame.lineno
    return None
