"""Looking at networks without training them: accuracy of a run, attention maps of images, stages and pairs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ..config import Recipe
from ..data import VAL_RESIZE, Dataset, ImageSet, balanced_subset, open_data, usual_workers
from ..data.decode import decode_into
from ..errors import UserError
from ..models import (
    Network,
    Preprocess,
    create_model,
    fixed_size,
    load_network,
    load_trained,
    run_once,
)
from ..models.authors import is_authors_run
from ..run_folder import RunFolder
from ..runtime.resolve import resolve_runtime
from ..taps import Stage, explain, match_stages, stages, unpaired_stages
from ..train.run import EVALUATION_BATCH
from .evaluate import as_input, evaluate
from .inference import InferenceModel, stage_maps

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = ("wrn-", "nin-")  # made for images of 32×32
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")


def evaluate_run(folder: Path, spec: str | None, limit: int | None, device: str) -> dict[str, Any]:
    """Error and loss of a run's network on its own validation images, or on other data of the same classes.

    Of a run of the authors' script (which does not say where its data is), on the data that `spec` names.
    """
    network = load_trained(folder)
    config = RunFolder(folder).config()
    own = spec is None
    if own and "data" not in config:
        raise UserError(f"{folder} does not say what data it is for: give --data")
    height = network.preprocess.size[0] if network.preprocess.size else None
    data = open_data(
        config["data"] if own else str(spec),
        # Its own images as the run saw them; a network of one input size resizes them itself.
        image_size=config.get("image_size") if own else height,
        limit_train=1,  # none is looked at
        limit_val=limit if not own or limit is not None else config.get("limit_val"),
        val_split=config.get("val_split") if own else None,
        seed=config.get("seed", 0),
        on_bad_image=config.get("on_bad_image", "error"),
        workers=usual_workers(on_cpu=device == "cpu"),
        val_resize=val_resize(config),
    )
    if not network.knows(data.classes):
        raise UserError(
            f"{folder} knows the classes {', '.join(network.classes[:4])}, …; the data "
            f"{', '.join(data.classes[:4])}, …: expected the same"
        )
    inference, chosen = inference_on(network, folder, device)
    found = evaluate(inference, data.val.to(chosen), EVALUATION_BATCH, chosen)
    return {"run": str(folder), "data": data.spec, **found, "images": len(data.val)}


def val_resize(config: Mapping[str, Any]) -> float:
    """How much larger than its network's input a run resizes validation images before it cuts their centre out."""
    return VAL_RESIZE if config.get("augment") == "imagenet" else 1.0


def inference_on(network: Network, folder: Path, device: str) -> tuple[InferenceModel, str]:
    """A run's network with its preprocessing on a device, in the precision that the run had, and that device."""
    earlier = RunFolder(folder).environment().get("auto") or {}
    chosen = resolve_runtime(
        Recipe(device=device), 0, {"precision": earlier.get("precision", "fp32"), "compile": False}
    )
    inference = (
        InferenceModel(network.module, network.preprocess, chosen.precision)
        .to(chosen.device)
        .eval()
    )
    return inference.to(memory_format=torch.channels_last), chosen.device


def image_files(path: Path) -> list[Path]:
    """A file as it is, or the image files of a folder at any depth, sorted.

    Raises:
        UserError: where `path` does not exist, or is a folder without images.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: expected an image, or a folder of images")
    files = (
        [path]
        if path.is_file()
        else sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES)
    )
    if not files:
        raise UserError(f"no image in {path}: expected {', '.join(SUFFIXES)}")
    return files


def map_columns(
    names: list[str], images: str, limit: int, kind: str, p: float
) -> tuple[np.ndarray, list[tuple[str, list[str] | None, dict[str, np.ndarray]]]]:
    """Images (K, H, W, 3) and, for each network, (title, predictions or None, {stage: maps (K, h, w)}).

    Raises:
        UserError: where there are no images, or a name is neither a run nor a model.
    """
    networks = [_network(name) for name in names]
    sizes = [n.preprocess.size[0] for n in networks if n.preprocess.size]
    pictures = _pictures(images, limit, max(sizes, default=224))
    x = as_input(pictures.batch(slice(None)))
    columns = []
    for name, network in zip(names, networks, strict=True):
        inference = InferenceModel(network.module, network.preprocess, "fp32").eval()
        layers = [s.name for s in inference.stages(pictures.image_size)]
        if not layers:
            raise UserError(f"{name} has no feature maps to draw")
        logits, found = stage_maps(inference, layers, x, kind, p)
        labels = (
            [network.classes[i] for i in logits.argmax(1).tolist()] if network.classes else None
        )
        columns.append(
            (_title(name), labels, {n: m.numpy() for n, m in zip(layers, found, strict=True)})
        )
    return pictures.images.numpy(), columns


def print_stages(model: str, teacher: str | None, image_size: int | None, console: Console) -> None:
    """A table of each network's stages, and of the pairs between the two."""
    names = [n for n in (model, teacher) if n is not None]
    found: list[list[Stage]] = []
    for name in names:
        network = _network(name)
        own = network.preprocess.size or fixed_size(network.module)  # it resizes any batch to that
        usual = image_size or (
            32 if all(n.startswith(SMALL) or RunFolder(n).exists for n in names) else 224
        )
        size = own or (usual, usual)
        run_once(
            Network(network.module, name, (), Preprocess(*IMAGENET)), torch.zeros(1, 3, *size), name
        )
        found.append(stages(network.module, torch.zeros(1, 3, *size)))
        only = ", the size that it takes" if own and image_size not in (None, own[0]) else ""
        table = _table(
            f"{name}, images of {size[0]}×{size[1]}{only}",
            "layer",
            "channels",
            "size",
            "stride",
            "depth",
        )
        for stage in found[-1]:
            numbers = (
                str(stage.channels),
                "×".join(map(str, stage.size)),
                f"{stage.stride:.3g}",
                str(stage.depth),
            )
            table.add_row(stage.name, *numbers)
        console.print(table)
    if teacher is not None:
        pairs = match_stages(found[0], found[1])
        students, teachers = ({s.name: s for s in side} for side in found)
        table = _table("pairs", "student", "teacher", "why")
        for student_layer, teacher_layer in pairs:
            why = explain(students[student_layer], teachers[teacher_layer])
            table.add_row(student_layer, teacher_layer, why)
        for side, layer, why in unpaired_stages(found[0], found[1]):
            table.add_row(*((layer, "–") if side == "student" else ("–", layer)), why)
        console.print(table)
        console.print(
            f"--pairs {','.join(f'{s}={t}' for s, t in pairs)}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(
            heading,
            justify="right" if heading in ("channels", "size", "stride", "depth") else "left",
        )
    return table


def _title(name: str) -> str:
    """A short name for a column: a run's folder, with its parent's where the folder is but a seed."""
    parts = Path(name).parts
    return (
        "/".join(parts[-2:])
        if RunFolder(name).exists and parts[-1].startswith("seed-")
        else parts[-1]
    )


def _network(name: str) -> Network:
    """A run's network, or a model by name; without trained weights its maps are those of its initialisation."""
    if RunFolder(name).exists or is_authors_run(name):
        return load_trained(name)
    if Path(name).is_dir():
        RunFolder.open(name)
    if name.endswith(":pretrained"):
        return load_network(name, [str(i) for i in range(1000)], *IMAGENET)
    torch.manual_seed(0)
    return Network(create_model(name, 10).eval(), name, (), Preprocess(*IMAGENET))


def _pictures(images: str, limit: int, size: int) -> ImageSet:
    if limit < 1:
        raise UserError(f"--limit is {limit}: expected at least 1")
    path = Path(images)
    if path.exists():
        files = image_files(path)[:limit]
        out = np.zeros((len(files), size, size, 3), dtype=np.uint8)
        decode_into(out, files, lambda i: str(files[i]), "error")
        return ImageSet(torch.from_numpy(out), torch.zeros(len(files), dtype=torch.int64), ("",))
    data: Dataset = open_data(images, limit_train=1, limit_val=limit)
    return data.val.subset(balanced_subset(data.val.labels, limit, seed=0))
