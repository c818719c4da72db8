"""`create_model`: wrn-16-1, nin-thin, timm/NAME, torchvision/NAME, zoo:NAME, FILE.py:FACTORY."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..errors import UserError, nearest, shown
from ..quiet import quiet
from ..run_folder import ZOO, RunFolder
from ..trust import executed_file
from .user_file import create_from_file, public_functions

EXAMPLES = (
    *("wrn-10-1", "wrn-16-1", "wrn-16-2", "wrn-28-10", "wrn-40-1", "wrn-40-2"),
    *("nin-thin", "nin-wide", "nin-thin-no-bn", "nin-wide-no-bn"),
)
FORMS = (
    "wrn-DEPTH-WIDTH, nin-thin[-no-bn], nin-wide[-no-bn], timm/NAME[:pretrained], "
    "torchvision/NAME[:pretrained], zoo:NAME or FILE.py:FACTORY"
)

# torchvision's networks with auxiliary heads, which a student is made without.
AUXILIARY_HEADS = ("googlenet", "inception_v3")


def create_model(name: str, num_classes: int) -> nn.Module:
    """A new network by name: images (N, 3, H, W) -> logits (N, num_classes).

    Args:
        name: `wrn-DEPTH-WIDTH`, `nin-thin` or `nin-wide` (`-no-bn`: without batch normalisation),
            `timm/resnet18[:pretrained]`, `torchvision/resnet18[:pretrained]`, `zoo:NAME` (a trained
            network of the package), or `FILE.py:FACTORY`, your own function, called with the
            keyword `num_classes` if it takes that.
        num_classes: the number of classes, at least 1. For another number than
            that of its weights, a pretrained network gets a new head.

    Raises:
        UserError: for any other name (the message has the nearest), a depth that is not 6n + 4, a
            file or function that fails, a function that returns no module.
    """
    if not isinstance(name, str):
        raise UserError(f"name is {shown(name)}: expected {FORMS}")
    if not isinstance(num_classes, Integral) or num_classes < 1:
        raise UserError(f"num_classes is {shown(num_classes)}: expected a whole number ≥ 1")
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        from .wrn import WideResNet

        return WideResNet(int(match[1]), int(match[2]), num_classes)
    if match := re.fullmatch(r"nin-(thin|wide)(-no-bn)?", name):
        from .nin import NetworkInNetwork

        return NetworkInNetwork(match[1], num_classes, normalised=match[2] is None)
    if match := re.fullmatch(r"timm/([^:]+)(:pretrained)?", name):
        return _create_timm(match[1], num_classes, match[2] is not None)
    if match := re.fullmatch(r"torchvision/([^:]+)(:pretrained)?", name):
        return _create_torchvision(match[1], num_classes, match[2] is not None)
    if name.startswith(ZOO):
        return _create_from_zoo(name, num_classes)
    if (file := executed_file(name)) is not None:
        return create_from_file(file, name.rpartition(":")[2], num_classes)
    suggestions = _suggestions(name)[:3]
    hint = nearest(name, EXAMPLES)
    if suggestions:
        hint = f"; did you mean {' or '.join(suggestions)}?"
    raise UserError(f"unknown model {name!r}: expected {FORMS}{hint}")


def architecture(name: str) -> str:
    """The architecture of `zoo:NAME`; any other name unchanged."""
    if name.startswith(ZOO):
        return str(RunFolder(name).config()["model"])
    return name


def _create_from_zoo(name: str, num_classes: int) -> nn.Module:
    """A network of the package with its weights; for another number of classes, with a new head."""
    from .network import load_run_network
    from .weights import load_backbone

    trained = load_run_network(name)
    module = trained.module
    if len(trained.classes) != num_classes:
        module = create_model(architecture(name), num_classes)
        load_backbone(module, trained.module.state_dict(), name)
    # timm's attribute, from which the preprocessing of all pretrained networks is read.
    mean, std = trained.preprocess.statistics
    module.pretrained_cfg = {"mean": mean, "std": std}  # type: ignore[assignment]
    return module


def _suggestions(name: str) -> list[str]:
    """Valid names similar to `name`, which lacks a function or a library, or is misspelt."""
    if name.endswith(".py"):
        return [f"{name}:{function}" for function in public_functions(Path(name))]
    if match := re.fullmatch(r"(\w+)/([^:]+)(:.*)?", name):
        model = match[2] + (":pretrained" if match[3] else "")
        libraries = difflib.get_close_matches(match[1], ("timm", "torchvision"), n=1)
        return [f"{library}/{model}" for library in libraries]
    import timm
    from torchvision import models

    suggestions = []
    model = name.removesuffix(":pretrained")
    if model in models.list_models(module=models):
        suggestions.append(f"torchvision/{name}")
    if timm.is_model(model):
        suggestions.append(f"timm/{name}")
    return suggestions


def pretrained_classes(name: str) -> int | None:
    """The number of classes of the pretrained weights of `timm/NAME` or `torchvision/NAME`.

    None for other names, and if the number is not recorded.
    """
    library, _, model = name.removesuffix(":pretrained").partition("/")
    if library == "timm":
        import timm

        config = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
        return None if config is None else config.num_classes
    if library == "torchvision":
        from torchvision import models

        if model in models.list_models(module=models):
            categories = models.get_model_weights(model).DEFAULT.meta.get("categories", ())
            return len(categories) or None
    return None


class PretrainedImages(NamedTuple):
    """A library's preprocessing: images are resized to `resize` times `size` and center-cropped."""

    size: int
    resize: float


def pretrained_images(name: str) -> PretrainedImages | None:
    """The preprocessing of timm/NAME:pretrained or torchvision/NAME:pretrained; else None."""
    library, _, model = name.removesuffix(":pretrained").partition("/")
    if not name.endswith(":pretrained") or pretrained_classes(name) is None:
        return None
    if library == "timm":
        import timm

        config = timm.get_pretrained_cfg(model)
        assert config is not None, "it has classes"
        return PretrainedImages(config.input_size[-1], 1 / config.crop_pct)
    from torchvision import models

    transforms = models.get_model_weights(model).DEFAULT.transforms()
    (crop,), (resize,) = transforms.crop_size, transforms.resize_size
    return PretrainedImages(crop, resize / crop)


def _create_timm(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    import timm

    if not timm.is_model(name):
        hint = nearest(name, timm.list_models())
        raise UserError(f"unknown model 'timm/{name}': timm has no {name!r}{hint}")
    if not pretrained:
        return timm.create_model(name, num_classes=num_classes)
    if not timm.is_model_pretrained(name):
        hint = nearest(name, timm.list_models(pretrained=True))
        raise UserError(f"timm has no trained weights of {name!r}{hint}")
    return _download(
        f"timm/{name}", lambda: timm.create_model(name, pretrained=True, num_classes=num_classes)
    )


def _create_torchvision(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        hint = nearest(name, names)
        raise UserError(
            f"unknown model 'torchvision/{name}': torchvision has no classifier {name!r}{hint}"
        )
    if not pretrained:
        options = {}
        if name in AUXILIARY_HEADS:
            # With auxiliary heads, the output in training would be a tuple. Without
            # `init_weights`, torchvision warns that it initialises the weights.
            options = {"aux_logits": False, "init_weights": True}
        return models.get_model(name, num_classes=num_classes, **options)
    model: Any = _download(f"torchvision/{name}", lambda: models.get_model(name, weights="DEFAULT"))
    # The pretrained weights of Inception and GoogLeNet include the auxiliary heads.
    for auxiliary in ("AuxLogits", "aux1", "aux2"):
        if hasattr(model, auxiliary):
            setattr(model, auxiliary, None)
            model.aux_logits = False
    transforms = models.get_model_weights(name).DEFAULT.transforms()  # type: ignore[attr-defined]
    # timm's attribute, from which the preprocessing of all pretrained networks is read.
    model.pretrained_cfg = {"mean": tuple(transforms.mean), "std": tuple(transforms.std)}
    if pretrained_classes(f"torchvision/{name}") != num_classes:
        _replace_head(model, num_classes)
    return model


def _download(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """A model with weights from the internet, or from the library's cache."""
    from safetensors import SafetensorError

    try:
        with quiet(logging.ERROR):  # timm and huggingface_hub log each retry
            return make()
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two: a damaged file
        reason = " ".join(str(error).split()[:25]) or type(error).__name__
        raise UserError(
            f"the weights of {name}:pretrained could not be fetched: {reason} (offline, give "
            f"{name} and a file of weights: --teacher-weights FILE, --student-weights FILE or, to "
            "evaluate, --weights FILE)"
        ) from error


def _replace_head(model: nn.Module, num_classes: int) -> None:
    """Replaces the last linear layer or convolution by a new head for `num_classes` classes."""
    # In all of torchvision's classifiers, the head is registered last.
    for name, head in reversed(list(model.named_modules())):
        if isinstance(head, nn.Linear):
            return model.set_submodule(name, nn.Linear(head.in_features, num_classes))
        if isinstance(head, nn.Conv2d):  # SqueezeNet's, of 1×1
            return model.set_submodule(name, nn.Conv2d(head.in_channels, num_classes, 1))
