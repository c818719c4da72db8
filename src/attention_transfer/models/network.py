"""A trained network with its name, classes and preprocessing, as a run folder keeps it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..arguments import check_path
from ..authors_log import MODEL_FILE, is_authors_run
from ..errors import UserError, first_few, first_line
from ..run_folder import RunFolder, parse_json, replacing
from ..run_schema import Metadata, validated
from ..trust import check_trusted
from .authors import load_authors_run
from .create import create_model
from .trained import Preprocess, TrainedNetwork
from .weights import load_weights

METADATA_KEY = "attention_transfer"  # in the metadata of a safetensors file


@dataclass
class Network:
    """A module with its name, class names, preprocessing, and the SHA-256 of its weights.

    `has_class_names` is False if its files do not name the classes, which are then numbered.
    """

    module: nn.Module
    name: str
    classes: tuple[str, ...]
    preprocess: Preprocess
    fingerprint: str | None = None
    folder: str | None = None
    has_class_names: bool = True
    is_trained: bool = True

    @property
    def image_size(self) -> tuple[int, int]:
        """The size (H, W) to which a trained network resizes images."""
        assert self.preprocess.size is not None, "a trained network knows its size"
        return self.preprocess.size

    def metadata(self) -> dict[str, Any]:
        """The metadata of a trained network."""
        return metadata(self.name, self.classes, self.preprocess, self.image_size)

    def matches_classes(self, classes: Sequence[str]) -> bool:
        """Whether these are the network's classes; without names, whether it has as many."""
        if self.has_class_names:
            return self.classes == tuple(classes)
        return len(self.classes) == len(classes)

    def check_classes(self, classes: Sequence[str], name: str) -> None:
        """Raises `UserError` unless these are its classes; errors call the network `name`."""
        check_classes(self.classes, classes, self.has_class_names, name)


def check_classes(own: Sequence[str], classes: Sequence[str], has_names: bool, name: str) -> None:
    """Raises `UserError` if a network's `own` classes are not the data's; errors call it `name`.

    If `has_names` is False, the network's classes are only numbered.
    """
    if len(own) != len(classes):
        raise UserError(
            f"{name} has {len(own)} classes, the data has {len(classes)}: expected the same classes"
        )
    if has_names and tuple(own) != tuple(classes):
        raise UserError(
            f"{name} has the classes {first_few(own, 4)}, the data has {first_few(classes, 4)}: "
            "expected the same"
        )


def fixed_size(module: nn.Module) -> tuple[int, int] | None:
    """The input size (H, W) of a network that takes only one, such as many transformers.

    None for a network that takes several sizes, and if the size is not known. It is read from the
    layers: with `img_size=32`, `timm.create_model` leaves the pretrained configuration at 224.
    """
    # torchvision's transformers have `image_size`; a user's network may have it.
    if size := _height_and_width(getattr(module, "image_size", None)):
        return size
    for layer in (module, *module.children()):
        # timm's patch embedding, if it takes only one size.
        size = _height_and_width(getattr(layer, "img_size", None))
        if size and getattr(layer, "strict_img_size", False):
            return size
    config = getattr(module, "pretrained_cfg", None)
    if not isinstance(config, dict) or not config.get("fixed_input_size"):
        return None
    for layer in module.modules():
        if size := _height_and_width(getattr(layer, "img_size", None)):
            return size
    # Some of timm's networks, such as LeViT, do not state their size: try that of the weights.
    height, width = config["input_size"][-2:]
    return (height, width) if _runs_on(module, (height, width)) else None


def _height_and_width(size: object) -> tuple[int, int] | None:
    """Parses a size that is a number or a pair; None for anything else."""
    match size:
        case int():
            return size, size
        case (int(height), int(width)):
            return height, width
    return None


def _runs_on(module: nn.Module, size: tuple[int, int]) -> bool:
    """Whether a network in eval mode takes images of this size."""
    training = module.training
    try:
        with torch.no_grad():
            module.eval()(torch.zeros(1, 3, *size))
    except Exception:
        return False
    finally:
        module.train(training)
    return True


def save_student(file: Path, module: nn.Module, about: Mapping[str, Any]) -> None:
    """Writes weights and their `metadata` as safetensors, atomically."""
    from safetensors.torch import save

    # safetensors refuses tensors that share memory, and strided ones (channels last).
    state = {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}
    with replacing(file) as partial:
        # `save_file` of safetensors would create a file that only its owner can read.
        partial.write_bytes(save(state, metadata={METADATA_KEY: json.dumps(about)}))


def metadata(
    name: str, classes: Sequence[str], preprocess: Preprocess, image_size: Sequence[int]
) -> dict[str, Any]:
    """Name, classes and preprocessing of a network as plain values, to store with its weights."""
    mean, std = preprocess.statistics
    return {
        "model": name,
        "classes": list(classes),
        "input": (
            "images (N, 3, H, W), RGB, in [0, 1], resized to image_size, less mean, divided by std"
        ),
        "mean": mean,
        "std": std,
        "image_size": list(image_size),
    }


def load_student(run_folder: str | Path, trust_code: bool = False) -> TrainedNetwork:
    """The trained network of a run, in eval mode: images (N, 3, H, W), RGB, in [0, 1] -> logits.

    Its preprocessing is inside. `.network` is the network alone, for normalised images. The other
    attributes are `.preprocess`, `.class_names` and `.image_size`.

    Args:
        run_folder: a run folder of this package, or `zoo:NAME`.
        trust_code: execute the Python file of a network FILE.py:FACTORY. Nothing else in a run
            folder is ever executed.

    Raises:
        UserError: if the folder is not a run, its run is not finished, or its network executes a
            file and `trust_code` is False.
    """
    check_path(run_folder, "run_folder")
    network = load_run_network(run_folder, trust_code)
    return TrainedNetwork(network.module, network.preprocess, network.classes)


def load_trained(folder: str | Path, trust_code: bool = False) -> Network:
    """The network of a run, ours or the authors' (the student of their distillation).

    The authors' files have no class names: the classes are "0", "1" and so on.

    Raises:
        UserError: if `folder` is neither; as `load_run_network` and `load_authors_run`.
    """
    if RunFolder(folder).exists or not is_authors_run(folder):
        return load_run_network(folder, trust_code)
    run = load_authors_run(folder)
    return Network(
        run.model.network,
        run.name,
        run.model.class_names,
        run.model.preprocess,
        fingerprint=run_fingerprint(folder),
        folder=str(folder),
        has_class_names=run.classes is not None,
    )


def load_run_network(folder: str | Path, trust_code: bool = False) -> Network:
    """The network that a run trained.

    Raises:
        UserError: if `folder` is not a run, its run has not written a network yet, or its network
            executes a file and `trust_code` is False.
    """
    run = RunFolder.open(folder)
    if not run.student_file.is_file():
        raise UserError(
            f"{folder} has no student.safetensors: its run is not finished; "
            "run its command again to continue it"
        )
    about = read_metadata(run.student_file)
    if about is None:
        raise UserError(
            f"{run.student_file} was not written by attention-transfer: its metadata is missing"
        )
    name, classes = about["model"], tuple(about["classes"])
    # The file holds the weights, so the pretrained ones need not be downloaded.
    architecture = name.removesuffix(":pretrained")
    check_trusted(run.student_file, architecture, trust_code)
    fingerprint = file_fingerprint(run.student_file)
    check_weights(run, fingerprint)
    try:
        module = create_model(architecture, len(classes))
    except UserError as error:
        raise UserError(f"{run.student_file}: {error}") from error
    load_weights(module, run.student_file)
    preprocess = Preprocess(about["mean"], about["std"], tuple(about["image_size"]))
    return Network(module.eval(), name, classes, preprocess, fingerprint, str(folder))


def check_weights(run: RunFolder, fingerprint: str | None) -> None:
    """Raises `UserError` if summary.json, where it has a hash, has that of other weights."""
    recorded = (run.summary() or {}).get("sha256")
    if recorded not in (None, fingerprint):
        raise UserError(
            f"{run.student_file} was damaged or replaced: its SHA-256 is not that in summary.json; "
            "restore the file, or train again"
        )


def read_metadata(file: Path) -> dict[str, Any] | None:
    """The metadata that `save_student` wrote into a safetensors file; None for other files.

    Raises:
        UserError: for a damaged file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            text = (content.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is damaged: {first_line(error)}") from error
    if text is None:
        return None
    source = f"{file}, its metadata,"
    return validated(parse_json(text, source), Metadata, source)


def saved_preprocess(weights: str | Path) -> Preprocess | None:
    """The preprocessing in the metadata of a file of weights; None for other files."""
    about = None
    if Path(weights).suffix == ".safetensors":
        about = read_metadata(Path(weights))
    if about is None:
        return None
    return Preprocess(about["mean"], about["std"], tuple(about["image_size"]))


def run_fingerprint(folder: str | Path) -> str | None:
    """The SHA-256 of the weights of a run, ours or the authors'; None if it has none yet."""
    file = RunFolder(folder).student_file
    # Our run without a network yet has none, even if its folder also has the authors' files.
    if not file.is_file() and not RunFolder(folder).exists:
        file = Path(folder) / MODEL_FILE
    return file_fingerprint(file) if file.is_file() else None


def file_fingerprint(file: Path) -> str:
    """The SHA-256 of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
