"""`create_model`: wrn-16-1, nin-thin, timm/NAME[:pretrained], torchvision/NAME[:pretrained], FILE.py:FACTORY."""

from __future__ import annotations

import ast
import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import logging
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UserError, nearest

USERS = "attention_transfer_user_"  # how the modules of model files begin
HERE = Path(__file__).resolve().parent
EXAMPLES = (
    *("wrn-10-1", "wrn-16-1", "wrn-16-2", "wrn-28-10", "wrn-40-1", "wrn-40-2"),
    *("nin-thin", "nin-wide", "nin-thin-no-bn", "nin-wide-no-bn"),
)
FORMS = (
    "wrn-DEPTH-WIDTH, nin-thin[-no-bn], nin-wide[-no-bn], timm/NAME[:pretrained], torchvision/NAME[:pretrained] or "
    "FILE.py:FACTORY"
)


def create_model(name: str, num_classes: int) -> nn.Module:
    """A new network by name: images (N, 3, H, W) -> logits (N, num_classes).

    Args:
        name: `wrn-16-1` and the like, `nin-thin` and `nin-wide` (`-no-bn`: without batch normalisation),
            `timm/resnet18[:pretrained]`, `torchvision/resnet18[:pretrained]`, or `FILE.py:FACTORY`, a
            function of yours, called with `num_classes` (by that keyword where it takes it).
        num_classes: the number of classes, at least 1. Pretrained weights keep everything but the head.

    Raises:
        UserError: for a name that is none of these (the nearest is named), a depth that is not 6n + 4, a file or
            factory that fails, a factory that returns no module.
    """
    if num_classes < 1:
        raise UserError(f"num_classes is {num_classes}: expected at least 1")
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        from .wrn import WideResNet

        return WideResNet(int(match[1]), int(match[2]), num_classes)
    if match := re.fullmatch(r"nin-(thin|wide)(-no-bn)?", name):
        from .nin import NetworkInNetwork

        return NetworkInNetwork(match[1], num_classes, normalised=match[2] is None)
    if match := re.fullmatch(r"(timm|torchvision)/([^:]+)(:pretrained)?", name):
        make = _timm if match[1] == "timm" else _torchvision
        return make(match[2], num_classes, match[3] is not None)
    if match := re.fullmatch(r"(.+\.py):(\w+)", name):
        return _from_file(Path(match[1]), match[2], num_classes)
    raise UserError(
        f"unknown model {name!r}: expected {FORMS}{_meant(name) or nearest(name, EXAMPLES)}"
    )


def _meant(name: str) -> str:
    """`; did you mean …?` for a file without its function, a library's network without the library, a word misspelt."""
    found: list[str] = []
    if name.endswith(".py"):
        found = [f"{name}:{function}" for function in _functions(Path(name))]
    elif match := re.fullmatch(r"(\w+)/([^:]+)(:.*)?", name):
        libraries = difflib.get_close_matches(match[1], ("timm", "torchvision"), n=1)
        found = [
            f"{library}/{match[2]}{':pretrained' if match[3] else ''}" for library in libraries
        ]
    elif name:
        import timm
        from torchvision import models

        known = (("torchvision", models.list_models(module=models)), ("timm", timm.list_models()))
        found = [
            f"{library}/{name}"
            for library, names in known
            if name.removesuffix(":pretrained") in names
        ]
    return f"; did you mean {' or '.join(found[:3])}?" if found else ""


def _functions(file: Path) -> list[str]:
    """The functions and classes of a Python file, without running it."""
    try:
        body = ast.parse(file.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return []
    return [
        node.name
        for node in body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"
    ]


def pretrained_classes(name: str) -> int | None:
    """How many classes the pretrained weights of `timm/NAME` or `torchvision/NAME` know; None where not said."""
    source, _, rest = name.removesuffix(":pretrained").partition("/")
    if source == "timm":
        import timm

        config = timm.get_pretrained_cfg(rest) if timm.is_model(rest) else None
        return config.num_classes if config is not None else None
    if source == "torchvision":
        from torchvision import models

        if rest not in models.list_models(module=models):
            return None
        return len(models.get_model_weights(rest).DEFAULT.meta.get("categories", ())) or None
    return None


def _timm(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    if not pretrained:
        return timm.create_model(name, num_classes=num_classes)
    if not timm.is_model_pretrained(name):
        raise UserError(
            f"timm has no trained weights of {name!r}{nearest(name, timm.list_models(pretrained=True))}"
        )
    return _downloaded(
        f"timm/{name}", lambda: timm.create_model(name, pretrained=True, num_classes=num_classes)
    )


def _downloaded(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """A model with its weights from the network, or from the library's cache; the library's retries stay unsaid."""
    loggers = [logging.getLogger(n) for n in ("huggingface_hub", "timm")]
    levels = [(logger, logger.level) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        return make()
    except (OSError, RuntimeError) as error:  # of RuntimeErrors: a cut-off file, a damaged cache
        why = " ".join(str(error).split()[:25]) or type(error).__name__
        raise UserError(
            f"the weights of {name}:pretrained could not be fetched: {why} (where there is no network, give a file of "
            f"them: --teacher {name} --teacher-weights FILE, or --student-weights FILE)"
        ) from error
    finally:
        for logger, level in levels:
            logger.setLevel(level)


def _torchvision(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"torchvision has no classification model {name!r}{nearest(name, known)}")
    if not pretrained:
        # Inception's and GoogLeNet's auxiliary heads would make the output a tuple in training.
        extra = (
            {"aux_logits": False, "init_weights": True}
            if name in ("googlenet", "inception_v3")
            else {}
        )
        return models.get_model(name, num_classes=num_classes, **extra)
    model: Any = _downloaded(
        f"torchvision/{name}", lambda: models.get_model(name, weights="DEFAULT")
    )
    for auxiliary in ("AuxLogits", "aux1", "aux2"):
        if hasattr(model, auxiliary):
            setattr(model, auxiliary, None)
            model.aux_logits = False
    transforms = models.get_model_weights(name).DEFAULT.transforms()  # type: ignore[attr-defined]
    model.pretrained_cfg = {"mean": tuple(transforms.mean), "std": tuple(transforms.std)}
    if pretrained_classes(f"torchvision/{name}") == num_classes:
        return model
    heads = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    path, head = heads[-1]
    parent = model.get_submodule(path.rpartition(".")[0])
    setattr(parent, path.rpartition(".")[2], _new_head(head, num_classes))
    return model


def _new_head(head: nn.Module, num_classes: int) -> nn.Module:
    """A linear layer, or the 1×1 convolution that SqueezeNet has in its place, for other classes."""
    if isinstance(head, nn.Linear):
        return nn.Linear(head.in_features, num_classes)
    assert isinstance(head, nn.Conv2d)
    return nn.Conv2d(head.in_channels, num_classes, 1)


def _from_file(file: Path, factory: str, num_classes: int) -> nn.Module:
    if not file.is_file():
        names = [f.name for f in file.parent.glob("*.py")] if file.parent.is_dir() else []
        hint = nearest(file.name, names)
        raise UserError(
            f"no model file {file}: expected a Python file with the function {factory}{hint}"
        )
    sys.path.insert(
        0, str(file.parent.resolve())
    )  # its neighbours are there to import, as where it runs as a script
    try:
        module = _load(file)
        make = getattr(module, factory, None)
        names = _functions(file)
        if make is None:
            has = f" (it has {', '.join(names[:5])})" if names else ""
            raise UserError(f"{file} has no function {factory!r}{nearest(factory, names) or has}")
        if not callable(make):
            raise UserError(
                f"{file}:{factory} is of type {type(make).__name__}: expected a function{nearest(factory, names)}"
            )
        options = {"num_classes": num_classes} if _takes_classes(make, f"{file}:{factory}") else {}
        model = _users(file, lambda: make(**options))
    finally:
        with contextlib.suppress(ValueError):  # the file may have changed it
            sys.path.remove(str(file.parent.resolve()))
    if not isinstance(model, nn.Module):
        hint = ": does it lack its return?" if model is None else ""
        raise UserError(
            f"{file}:{factory} returned a {type(model).__name__}: expected a torch.nn.Module{hint}"
        )
    return model


def _load(file: Path) -> Any:
    """A file as a module of its own, which is registered: dataclasses and pickles look theirs up by name."""
    place = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]
    name = f"{USERS}{file.stem}_{place}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    loader, module = spec.loader, importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        _users(file, lambda: loader.exec_module(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _takes_classes(make: Any, name: str) -> bool:
    """Whether a factory is to be given `num_classes`; one that needs anything else cannot be called."""
    try:
        parameters = inspect.signature(make).parameters.values()
    except ValueError:  # of a function that is not written in Python
        return True
    kinds = inspect.Parameter
    named = [p for p in parameters if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
    needed = [p.name for p in named if p.default is kinds.empty and p.name != "num_classes"]
    takes = any(p.name == "num_classes" and p.kind is not kinds.POSITIONAL_ONLY for p in named)
    if needed:
        fault = (
            f"needs {', '.join(needed)} too"
            if takes
            else f"takes {', '.join(needed)} and no num_classes"
        )
        raise UserError(
            f"{name} {fault}: expected a function that can be called with num_classes=N alone, or with nothing"
        )
    return takes or any(p.kind is kinds.VAR_KEYWORD for p in parameters)


def _users(file: Path, run: Callable[[], Any]) -> Any:
    """Runs a user's code; what it raises comes back as one line: its own error, and where in the user's code."""
    try:
        return run()
    except (Exception, SystemExit) as error:
        where, line = _place(error, file.resolve().parent) or (file.resolve(), None)
        if isinstance(error, SyntaxError) and error.filename is not None:
            where, line = Path(error.filename).resolve(), error.lineno
        shown = file if where == file.resolve() else file.parent / where.name
        said = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
        place = shown if line is None else f"{shown}, line {line}"
        raise UserError(
            f"{place}: {type(error).__name__}{f': {said[:300]}' if said else ''}"
        ) from error


def place_of(error: BaseException) -> str:
    """` (FILE, line N)`: where in a model file of the user's an error arose; empty where it was in no such file."""
    files = [m.__file__ for n, m in list(sys.modules.items()) if n.startswith(USERS) and m.__file__]
    found = [
        place for file in files if (place := _place(error, Path(file).resolve().parent)) is not None
    ]
    return f" ({found[0][0].name}, line {found[0][1]})" if found else ""


def _place(error: BaseException, folder: Path) -> tuple[Path, int | None] | None:
    """The innermost place of an error in the files of a folder, without what is installed there."""
    places = [
        (Path(f.filename).resolve(), f.lineno) for f in traceback.extract_tb(error.__traceback__)
    ]
    own = [
        (p, n)
        for p, n in places
        if p.is_relative_to(folder) and p.parent != HERE and "site-packages" not in p.parts
    ]
    return own[-1] if own else None
