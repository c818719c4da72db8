"""A trained network with what belongs to it: its name, classes and preprocessing, kept in one safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..run_folder import RunFolder, replacing
from .authors import MODEL_FILE, is_authors_run, load_authors_run
from .create import create_model, place_of, pretrained_classes
from .weights import file_state, load_body, load_state, load_weights, other_head


class Preprocess(nn.Module):
    """Images (N, 3, H, W) in [0, 1] -> what a network was trained on: resized where its size differs, normalised."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], size: tuple[int, int] | None = None
    ):
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.size is not None and tuple(x.shape[-2:]) != tuple(self.size):
            # In at least float32: on a CPU no kernel takes bfloat16, which training hands in.
            x = x if x.dtype == torch.float64 else x.float()
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False, antialias=True)
        return (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)


@dataclass
class Network:
    """A module with its name, class names, preprocessing, and a fingerprint of its weights.

    `named` is False where the classes are but numbered, since the network's files do not name them.
    """

    module: nn.Module
    name: str
    classes: tuple[str, ...]
    preprocess: Preprocess
    fingerprint: str | None = None
    folder: str | None = None
    named: bool = True

    def knows(self, classes: Sequence[str]) -> bool:
        """Whether these are the network's classes; where it has no names for them, whether they are as many."""
        return self.classes == tuple(classes) if self.named else len(self.classes) == len(classes)


def save_student(
    file: Path,
    module: nn.Module,
    name: str,
    classes: Sequence[str],
    preprocess: Preprocess,
    image_size: Sequence[int],
) -> None:
    """Writes weights and metadata as safetensors, whole or not at all."""
    from safetensors.torch import save

    about = metadata(name, classes, preprocess, image_size)
    state = {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}
    with replacing(file) as partial:
        # `save_file` would make it readable for its owner only.
        partial.write_bytes(save(state, metadata={"attention_transfer": json.dumps(about)}))


def metadata(
    name: str, classes: Sequence[str], preprocess: Preprocess, image_size: Sequence[int]
) -> dict[str, Any]:
    """What weights need beside them to be used, as plain values."""
    return {
        "model": name,
        "classes": list(classes),
        "mean": preprocess.mean.flatten().tolist(),
        "std": preprocess.std.flatten().tolist(),
        "image_size": list(image_size),
    }


def run_fingerprint(folder: str | Path) -> str | None:
    """The SHA-256 of the weights of a run, ours or the authors'; None where there are none."""
    file = RunFolder(folder).student_file
    if not file.is_file() and not RunFolder(folder).exists:
        file = Path(folder) / MODEL_FILE
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def load_run_network(folder: str | Path) -> Network:
    """The network that a run trained.

    Raises:
        UserError: where `folder` is no run, or its run has not written a network yet.
    """
    from safetensors import SafetensorError, safe_open

    run = RunFolder.open(folder)
    if not run.student_file.is_file():
        raise UserError(
            f"{folder} has no student.safetensors: its run is not finished; run its command again to continue it"
        )
    try:
        with safe_open(run.student_file, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("attention_transfer", "null"))
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{run.student_file} is damaged: {error}") from error
    if about is None:
        raise UserError(
            f"{run.student_file} was not written by attention-transfer: its metadata is missing"
        )
    module = create_model(about["model"].removesuffix(":pretrained"), len(about["classes"]))
    load_weights(module, run.student_file)
    preprocess = Preprocess(about["mean"], about["std"], tuple(about["image_size"]))
    return Network(
        module.eval(),
        about["model"],
        tuple(about["classes"]),
        preprocess,
        run_fingerprint(folder),
        str(folder),
    )


def load_trained(folder: str | Path) -> Network:
    """The network of a run, ours or the authors' (of their distillation, the student's).

    The authors' files name no classes: theirs are "0", "1" and so on.

    Raises:
        UserError: where `folder` is neither, or what `load_run_network` and `load_authors_run` raise.
    """
    if RunFolder(folder).exists or not is_authors_run(folder):
        return load_run_network(folder)
    run = load_authors_run(folder)
    classes = run.classes or tuple(str(i) for i in range(run.num_classes))
    preprocess = Preprocess(run.mean, run.std, run.image_size)
    fingerprint = run_fingerprint(folder)
    return Network(
        run.model, run.name, classes, preprocess, fingerprint, str(folder), run.classes is not None
    )


def load_student(run_folder: str | Path) -> nn.Module:
    """The trained module of a run, in eval mode, with its `classes` and `preprocess` (images in [0, 1] -> input).

    Raises:
        UserError: where the folder is no run, or its run is not finished.
    """
    network = load_run_network(run_folder)
    network.module.classes = network.classes  # type: ignore[assignment]
    network.module.preprocess = network.preprocess
    return network.module


def load_network(
    spec: str,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    weights: str | None = None,
) -> Network:
    """A network with trained weights (a teacher): a folder, or a model name that is `:pretrained` or has `weights`.

    A folder is a run of ours, or one of the authors' (of their distillation, the student).

    Raises:
        UserError: for a network without trained weights, or with other classes than the data.
    """
    if Path(spec).is_dir() or RunFolder(spec).exists:
        if weights is not None:
            raise UserError(
                f"the teacher {spec} is a run with weights of its own: leave --teacher-weights out"
            )
        network = load_trained(spec)
        if len(network.classes) != len(classes):
            raise UserError(
                f"the teacher {spec} knows {len(network.classes)} classes, the data has {len(classes)}: "
                "expected the same classes"
            )
        if not network.knows(classes):
            raise UserError(
                f"the teacher {spec} knows the classes {_few(network.classes)}, the data has {_few(classes)}"
            )
        return replace(network, classes=tuple(classes))
    if "/" in spec and not spec.startswith(("timm/", "torchvision/")) and ".py:" not in spec:
        raise UserError(
            f"no teacher at {spec}: expected a run folder, or a model with trained weights"
        )
    pretrained = spec.endswith(":pretrained")
    if weights is None and pretrained:  # before its weights are downloaded for nothing
        known = pretrained_classes(spec)
        if known not in (None, len(classes)):
            raise UserError(
                f"the teacher {spec} knows {known} classes, the data has {len(classes)}: fine-tune it first "
                f"(attention-transfer train --model {spec}) and give that run's folder"
            )
    module = create_model(spec, len(classes))
    if weights is None and not pretrained:
        own = f", {spec}:pretrained" if spec.startswith(("timm/", "torchvision/")) else ""
        raise UserError(
            f"the teacher {spec} has no trained weights: give a run folder{own}, or --teacher-weights FILE"
        )
    digest = None
    if weights is not None:
        _load_teacher(module, spec, weights, len(classes))
        digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    return Network(module.eval(), spec, tuple(classes), _own_preprocess(module, mean, std), digest)


def _load_teacher(module: nn.Module, spec: str, weights: str, classes: int) -> None:
    """Weights into a teacher; where only its head is another's, what to do about that."""
    state = file_state(module, weights)
    own = module.state_dict()
    head = other_head(own, state) if state.keys() == own.keys() else None
    if head is not None and head[2] == classes:
        raise UserError(
            f"the teacher's weights {weights} know {head[1]} classes, the data has {classes}: fine-tune them first "
            f"(attention-transfer train --model {spec} --student-weights {weights}) and give that run's folder"
        )
    load_state(module, state, weights)


def start_network(
    spec: str,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    weights: str | None = None,
) -> tuple[Network, list[str]]:
    """A network to be trained (a student), and lines on where it starts from.

    Args:
        spec: a model's name. A `:pretrained` one keeps everything but a head of another number of classes.
        mean, std: the data's; a network with trained weights keeps the normalisation that it was trained with.
        weights: a file, a run of ours or the authors', to start from. The head starts anew where its classes are not
            the data's.

    Raises:
        UserError: for weights that do not fit, and a pretrained model that is given others.
    """
    data = (mean, std)
    module = create_model(spec, len(classes))
    pretrained = spec.endswith(":pretrained")
    if weights is None:
        said = []
        if pretrained and (known := pretrained_classes(spec)) not in (None, len(classes)):
            said = [
                f"{spec}: its head knows {known} classes, the data has {len(classes)}, so the head starts anew"
            ]
        preprocess = (
            _own_preprocess(module, mean, std)
            if pretrained
            else Preprocess(mean, std, fixed_size(module))
        )
    elif pretrained:
        raise UserError(
            f"{spec} starts from its own weights: leave :pretrained or --student-weights out"
        )
    elif Path(weights).is_dir() or RunFolder(weights).exists:
        before = load_trained(weights)
        named = f"{weights} ({before.name})"
        line = load_body(module, before.module.state_dict(), named, not before.knows(classes))
        said = [f"the student starts from {named}", *([line] if line else [])]
        mean, std = (v.flatten().tolist() for v in (before.preprocess.mean, before.preprocess.std))
        preprocess = Preprocess(mean, std, fixed_size(module))
    else:
        line = load_body(module, file_state(module, weights), weights)
        said = [f"the student starts from {weights}", *([line] if line else [])]
        preprocess = _own_preprocess(module, mean, std)
    if not torch.equal(preprocess.mean, Preprocess(data[0], data[1]).mean):
        words = ", ".join(f"{v:.3g}" for v in preprocess.mean.flatten().tolist())
        said.append(
            f"the student sees images normalised as its weights did (mean {words}), not by the data's own"
        )
    return Network(module, spec, tuple(classes), preprocess), said


def check_network(network: Network, images: Tensor, who: str) -> None:
    """Runs a network once, in eval mode, on a few images (N, 3, H, W) in [0, 1]; `who` is what a fault is said of.

    Raises:
        UserError: where it fails on them, or puts out anything but logits (N, a column a class).
    """
    outputs = run_once(network, images, who)
    if not isinstance(outputs, Tensor):
        kind = type(outputs).__name__
        raise UserError(
            f"{who} puts out a {kind}: expected logits (N, {len(network.classes)}), a tensor alone"
        )
    if outputs.ndim == 2 and outputs.shape[1] != len(network.classes):
        raise UserError(
            f"{who} puts out logits of {outputs.shape[1]} classes, the data has {len(network.classes)}: expected "
            f"logits (N, {len(network.classes)}), a column a class"
        )
    if outputs.ndim != 2:
        raise UserError(
            f"{who} puts out {tuple(outputs.shape)}: expected logits (N, {len(network.classes)}), a column a class"
        )


def run_once(network: Network, images: Tensor, who: str) -> Any:
    """What a network puts out for these images, in eval mode.

    Raises:
        UserError: where it fails on them, with its own error: too small, or not the size that it is made for.
    """
    x = network.preprocess(images)
    try:
        with torch.no_grad():
            return network.module.eval()(x)
    except Exception as error:
        height, width = x.shape[-2:]
        said = " ".join(str(error).split()[:30])
        raise UserError(
            f"{who} fails on images of {height}×{width}{place_of(error)}: {type(error).__name__}: {said} (if it is "
            "made for another size, give that as --image-size)"
        ) from error


def _own_preprocess(module: nn.Module, mean: Sequence[float], std: Sequence[float]) -> Preprocess:
    """Pretrained models carry the normalisation they were trained with; others get the data's."""
    config = getattr(module, "pretrained_cfg", None)
    if isinstance(config, dict) and "mean" in config and "std" in config:
        mean, std = config["mean"], config["std"]
    return Preprocess(mean, std, fixed_size(module))


def fixed_size(module: nn.Module) -> tuple[int, int] | None:
    """The one input size (H, W) that a network takes, as a vision transformer with learned positions; else None."""
    config = getattr(module, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("fixed_input_size"):
        return tuple(config["input_size"][-2:])
    size = getattr(module, "image_size", None)  # torchvision's
    return (size, size) if isinstance(size, int) else None


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
