"""Loads the networks that a run starts with, a teacher and a student, and checks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..numerics import check_logits
from ..run_folder import ZOO, is_folder_name
from .create import architecture, create_model, pretrained_classes
from .network import Network, file_fingerprint, fixed_size, load_trained, saved_preprocess
from .trained import Preprocess
from .user_file import user_code_location
from .weights import head_mismatch, load_backbone, load_state, read_state_dict

LIBRARIES = ("timm/", "torchvision/")


def load_network(
    spec: str,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    weights: str | None = None,
    role: str = "teacher",
    trust_code: bool = False,
) -> Network:
    """A network with trained weights: a teacher, or one to evaluate.

    `spec` is `zoo:NAME`, a run folder, ours or the authors' (the student of their distillation), or
    a model's name with `:pretrained` or a file of `weights`. `mean` and `std` are the data's
    normalisation, used if the network has no normalisation of its own. `role` is its name in error
    messages. `trust_code`: a run may name a network FILE.py:FACTORY.

    Raises:
        UserError: for a network without trained weights, or with other classes than the data.
    """
    if is_folder_name(spec):
        return _load_teacher_run(spec, classes, weights, role, trust_code)
    # `spec` is a path that does not exist, or a model's name.
    if "/" in spec and not spec.startswith(LIBRARIES) and ".py:" not in spec:
        raise UserError(
            f"no {role} at {spec}: expected a run folder, or a model with trained weights"
        )
    pretrained = spec.endswith(":pretrained")
    if weights is None and pretrained:
        # Checked before `create_model`, which would download them.
        own_classes = pretrained_classes(spec)
        if own_classes not in (None, len(classes)):
            raise UserError(
                f"the {role} {spec} has {own_classes} classes, the data has {len(classes)}: "
                f"fine-tune it first (attention-transfer train --model {spec}) "
                "and give that run's folder"
            )
    module = create_model(spec, len(classes))
    fingerprint = saved = None
    if weights is not None:
        _load_teacher_weights(module, spec, weights, len(classes), role)
        fingerprint, saved = file_fingerprint(Path(weights)), saved_preprocess(weights)
    elif not pretrained:
        alternative = f", {spec}:pretrained" if spec.startswith(LIBRARIES) else ""
        raise UserError(
            f"the {role} {spec} has no trained weights: give a run folder{alternative}, "
            f"or {_weights_flag(role)} FILE"
        )
    preprocess = saved or _pretrained_preprocess(module, mean, std, fixed_size(module))
    return Network(module.eval(), spec, tuple(classes), preprocess, fingerprint)


def _weights_flag(role: str) -> str:
    return "--teacher-weights" if role == "teacher" else "--weights"


def _load_teacher_run(
    folder: str, classes: Sequence[str], weights: str | None, role: str, trust_code: bool
) -> Network:
    if weights is not None:
        raise UserError(
            f"the {role} {folder} is a run with weights of its own: leave {_weights_flag(role)} out"
        )
    network = load_trained(folder, trust_code)
    network.check_classes(classes, f"the {role} {folder}")
    # The authors' files only number the classes.
    return replace(network, classes=tuple(classes))


def _load_teacher_weights(
    module: nn.Module, spec: str, weights: str, classes: int, role: str
) -> None:
    expected = module.state_dict()
    state = read_state_dict(weights, expected)
    mismatch = head_mismatch(expected, state)
    same_names = state.keys() == expected.keys()  # otherwise the weights are another network's
    if mismatch is not None and mismatch.expected_classes == classes and same_names:
        raise UserError(
            f"the {role}'s weights {weights} have {mismatch.classes} classes, the data has "
            f"{classes}: fine-tune them first (attention-transfer train --model {spec} "
            f"--student-weights {weights}) and give that run's folder"
        )
    load_state(module, state, weights)


def start_network(
    spec: str,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    weights: str | None = None,
    trust_code: bool = False,
) -> tuple[Network, list[str]]:
    """A student to train, and notes for the user about its initial weights.

    `spec` is a model's name; `weights` is a file, or a run of ours or the authors'. A head for
    other classes is initialised anew. `mean` and `std` are the data's normalisation; trained
    weights keep their own. `trust_code` is as in `load_network`.

    Raises:
        UserError: for weights that do not fit, and for `weights` of a pretrained model.
    """
    if spec.startswith(ZOO):
        weights = weights or spec
    module = create_model(architecture(spec), len(classes))
    size = fixed_size(module)
    preprocess = Preprocess(mean, std, size)
    data_mean = preprocess.mean
    pretrained = spec.endswith(":pretrained")
    notes: list[str | None] = []
    if weights is None:
        if pretrained:
            preprocess = _pretrained_preprocess(module, mean, std, size)
            head_classes = pretrained_classes(spec)
            if head_classes not in (None, len(classes)):
                notes.append(
                    f"{spec}: its head has {head_classes} classes, the data has {len(classes)}, "
                    "so the head is initialised anew"
                )
    elif pretrained:
        raise UserError(
            f"{spec} starts from its own weights: leave :pretrained or --student-weights out"
        )
    elif is_folder_name(weights):
        run = load_trained(weights, trust_code)
        source = f"{weights} ({run.name})"
        new_head = not run.matches_classes(classes)
        note = load_backbone(module, run.module.state_dict(), source, new_head)
        notes += [f"the student starts from {source}", note]
        preprocess = Preprocess(*run.preprocess.statistics, size)
    else:
        note = load_backbone(module, read_state_dict(weights, module.state_dict()), weights)
        notes += [f"the student starts from {weights}", note]
        preprocess = _pretrained_preprocess(module, mean, std, size)
        if (saved := saved_preprocess(weights)) is not None:
            # The student takes images of the data's size, unless its own size is fixed.
            preprocess = Preprocess(*saved.statistics, size)
    if not torch.equal(preprocess.mean, data_mean):
        values = ", ".join(f"{value:.3g}" for value in preprocess.mean.flatten().tolist())
        notes.append(
            f"the student's images are normalised as its weights were trained (mean {values}), "
            "not by the data's own normalisation"
        )
    network = Network(module, spec, tuple(classes), preprocess)
    return network, [note for note in notes if note is not None]


def _pretrained_preprocess(
    module: nn.Module,
    mean: Sequence[float],
    std: Sequence[float],
    size: tuple[int, int] | None,
) -> Preprocess:
    """The normalisation of a library's pretrained weights if known, else the data's."""
    config = getattr(module, "pretrained_cfg", None)
    if isinstance(config, dict) and "mean" in config and "std" in config:
        mean, std = config["mean"], config["std"]
    return Preprocess(mean, std, size)


def check_network(network: Network, images: Tensor, name: str) -> None:
    """Runs a network once on a few images (N, 3, H, W) in [0, 1]; errors call it `name`.

    Raises:
        UserError: if it fails on them, or returns anything but logits (N, classes).
    """
    advice = " (if it is made for another size, give that as --image-size)"
    outputs = check_logits(run_once(network, images, name, advice), name)
    classes = len(network.classes)
    if outputs.shape[1] != classes:
        raise UserError(
            f"{name} returns logits of {outputs.shape[1]} classes, the data has {classes}: "
            f"expected logits (N, {classes})"
        )


def run_once(network: Network, images: Tensor, name: str, advice: str = "") -> Any:
    """The output of a network for these images, in eval mode.

    Errors call the network `name` and end with `advice`.

    Raises:
        UserError: with the network's error if it fails, for example because images are too small.
    """
    x = network.preprocess(images)
    try:
        with torch.no_grad():
            return network.module.eval()(x)
    except Exception as error:
        height, width = x.shape[-2:]
        reason = " ".join(str(error).split()[:30])
        raise UserError(
            f"{name} fails on images of {height}×{width}{user_code_location(error)}: "
            f"{type(error).__name__}: {reason}{advice}"
        ) from error
