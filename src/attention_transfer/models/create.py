"""`create_model`: wrn-16-1, nin-thin, timm/NAME[:pretrained], torchvision/NAME[:pretrained], FILE.py:FACTORY."""

from __future__ import annotations

import importlib.util
import re
import traceback
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UserError, nearest

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
    raise UserError(f"unknown model {name!r}: expected {FORMS}{nearest(name, EXAMPLES)}")


def pretrained_classes(name: str) -> int | None:
    """How many classes the pretrained weights of `timm/NAME` or `torchvision/NAME` know; None where not said."""
    source, _, rest = name.removesuffix(":pretrained").partition("/")
    if source == "timm":
        import timm

        config = timm.get_pretrained_cfg(rest)
        return config.num_classes if config is not None else None
    if source == "torchvision":
        from torchvision import models

        return len(models.get_model_weights(rest).DEFAULT.meta.get("categories", ())) or None
    return None


def _timm(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    return timm.create_model(name, pretrained=pretrained, num_classes=num_classes)


def _torchvision(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"torchvision has no classification model {name!r}{nearest(name, known)}")
    if not pretrained:
        # Inception's and GoogLeNet's auxiliary heads would make the output a tuple in training.
        extra = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
        return models.get_model(name, num_classes=num_classes, **extra)
    model = models.get_model(name, weights="DEFAULT")
    for auxiliary in ("AuxLogits", "aux1", "aux2"):
        if hasattr(model, auxiliary):
            setattr(model, auxiliary, None)
            model.aux_logits = False
    transforms = models.get_model_weights(name).DEFAULT.transforms()  # type: ignore[attr-defined]
    model.pretrained_cfg = {"mean": tuple(transforms.mean), "std": tuple(transforms.std)}
    if pretrained_classes(f"torchvision/{name}") == num_classes:
        return model
    heads = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not heads:
        raise UserError(f"torchvision/{name}:pretrained has no linear head to replace for {num_classes} classes")
    head_name, head = heads[-1]
    parent = model.get_submodule(head_name.rpartition(".")[0])
    setattr(parent, head_name.rpartition(".")[2], nn.Linear(head.in_features, num_classes))
    return model


def _from_file(file: Path, factory: str, num_classes: int) -> nn.Module:
    if not file.is_file():
        raise UserError(f"no model file {file}: expected a Python file with the function {factory}")
    spec = importlib.util.spec_from_file_location(f"attention_transfer_user_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _users(file, lambda: spec.loader.exec_module(module))
    make = getattr(module, factory, None)
    if not callable(make):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UserError(f"{file} has no function {factory!r}{nearest(factory, names)}")
    model = _users(file, lambda: make(num_classes=num_classes) if _takes(make, "num_classes") else make())
    if not isinstance(model, nn.Module):
        raise UserError(f"{file}:{factory} returned a {type(model).__name__}: expected a torch.nn.Module")
    return model


def _takes(function: Any, keyword: str) -> bool:
    import inspect

    parameters = inspect.signature(function).parameters.values()
    return any(p.name == keyword or p.kind is p.VAR_KEYWORD for p in parameters)


def _users(file: Path, run: Any) -> Any:
    """Runs a user's code; what it raises comes back as one line with its own error and line."""
    try:
        return run()
    except (Exception, SystemExit) as error:
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == file.resolve()
        ]
        line = error.lineno if isinstance(error, SyntaxError) else (lines[-1] if lines else "?")
        raise UserError(
            f"{file}, line {line}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
