"""Runs of the authors' scripts: rebuilds their networks from the tensors alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..arguments import check_path
from ..authors_log import EXTRA_KEY, LOG_FILE, MODEL_FILE, read_epochs
from ..errors import UserError
from ..image_statistics import CIFAR10, IMAGENET
from ..run_schema import Metadata, validated
from .authors_files import read_params
from .authors_resnet import AuthorsResNet
from .trained import Preprocess, TrainedNetwork
from .weights import load_state
from .wrn import WideResNet

ImageFormat = tuple[Sequence[float], Sequence[float], tuple[int, int], tuple[str, ...] | None]
# (mean, std, size, class names); the normalisation is that of the scripts.
CIFAR_IMAGES: ImageFormat = (*CIFAR10, (32, 32), None)
IMAGENET_IMAGES: ImageFormat = (*IMAGENET, (224, 224), None)
# By the numbers of blocks of the groups.
RESNET_NAMES: dict[tuple[int, ...], str] = {(2, 2, 2, 2): "resnet-18", (3, 4, 6, 3): "resnet-34"}


@dataclass
class AuthorsRun:
    """A run of the authors' scripts; `model` is the student of a distillation.

    Both networks take images (N, 3, H, W), RGB, in [0, 1], with their preprocessing inside.
    `options` are the first line of the log; empty if that line is cut short. `classes` are known
    from our exports; without them, `class_names` of the networks are "0", "1" and so on.
    """

    model: TrainedNetwork
    teacher: TrainedNetwork | None
    options: dict[str, Any]
    name: str
    teacher_name: str | None
    num_classes: int
    classes: tuple[str, ...] | None = None


def load_authors_run(folder: str | Path) -> AuthorsRun:
    """The networks, in eval mode, and options of a run of the authors' CIFAR or ImageNet script.

    Args:
        folder: a folder of their `logs/`, with `log.txt` and `model.pt7`.

    Returns:
        `AuthorsRun`: `.model` and `.teacher` (None without one) take images (N, 3, H, W), RGB, in
        [0, 1]; `.options` are those of the script.

    Raises:
        UserError: for missing or damaged files, a log without json_stats, tensors that fit none of
            the authors' networks, and another number of classes in the log than in the tensors.
    """
    check_path(folder, "folder")
    folder = Path(folder)
    file = folder / MODEL_FILE
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder: expected a run of the authors' script, "
            f"with {LOG_FILE} and {MODEL_FILE}"
        )
    for name in (LOG_FILE, MODEL_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: expected a run of the authors' script")
    options = next(iter(read_epochs(folder / LOG_FILE)), {})
    student_params, teacher_params = read_params(file)
    network, name = _build(student_params, file)
    classes = network.fc.out_features
    teacher_network, teacher_name = None, None
    if teacher_params is not None:
        teacher_network, teacher_name = _build(teacher_params, file)
        if teacher_network.fc.out_features != classes:
            raise UserError(
                f"{file}: its student has {classes} classes, "
                f"its teacher {teacher_network.fc.out_features}: expected the same"
            )
    logged = options.get("num_classes")
    if logged not in (None, classes):
        raise UserError(
            f"{folder}: {LOG_FILE} has num_classes {logged}, the tensors of {MODEL_FILE} have "
            f"{classes}: expected files of one run"
        )
    images = IMAGENET_IMAGES if isinstance(network, AuthorsResNet) else CIFAR_IMAGES
    if EXTRA_KEY in options:
        images = _exported_format(folder, options[EXTRA_KEY], classes)
    model = _with_preprocessing(network, images)
    teacher = None if teacher_network is None else _with_preprocessing(teacher_network, images)
    return AuthorsRun(model, teacher, options, name, teacher_name, classes, images[3])


def _with_preprocessing(network: WideResNet | AuthorsResNet, images: ImageFormat) -> TrainedNetwork:
    mean, std, size, names = images
    if names is None:
        names = tuple(str(i) for i in range(network.fc.out_features))
    return TrainedNetwork(network, Preprocess(mean, std, size), names)


def _build(params: Mapping[str, Tensor], file: Path) -> tuple[WideResNet | AuthorsResNet, str]:
    """The network of these tensors, with its weights, and its name."""
    head = params.get("fc.weight")
    if head is None or head.ndim != 2 or not len(head):
        raise UserError(
            f"{file} has no fc.weight (classes, features): "
            "expected a network of the authors' scripts"
        )
    # The names of the blocks and the shape of the head determine the network. `teacher_id` and
    # `depth` in the log are not used: they may belong to another run.
    blocks = []
    for g in range(4):
        names = [name.split(".")[1] for name in params if name.startswith(f"group{g}.block")]
        blocks.append(len(set(names)))
    classes, features = head.shape
    model: WideResNet | AuthorsResNet
    if blocks[3]:  # a WRN has three groups
        # The script's ResNet-34 student has 3, 4, 6, 5 blocks by mistake, so its name lists them.
        name = RESNET_NAMES.get(tuple(blocks), f"resnet-{'-'.join(map(str, blocks))}")
        model = AuthorsResNet(blocks, features // 8, classes, folded="conv0.bias" in params)
    else:
        # At least the smallest network, so that the error can list the missing tensors.
        # A group has (depth − 4) / 6 blocks, and the head reads 64 · width features.
        depth, width = 6 * max(1, blocks[0]) + 4, max(1, features // 64)
        name = f"wrn-{depth}-{width}"
        model = WideResNet(depth, width, classes)
    load_state(model, params, f"{file}, taken for {name},")
    return model.eval(), name


def _exported_format(folder: Path, entry: Any, outputs: int) -> ImageFormat:
    """Class names and preprocessing, which our export wrote into the log."""
    about = validated(entry, Metadata, f"{folder / LOG_FILE}, its {EXTRA_KEY} entry,")
    classes = tuple(about["classes"])
    if len(classes) != outputs:
        raise UserError(
            f"{folder}: {LOG_FILE} names {len(classes)} classes, the tensors of {MODEL_FILE} have "
            f"{outputs}"
        )
    return about["mean"], about["std"], tuple(about["image_size"]), classes
