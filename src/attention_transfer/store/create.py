"""Creates a store. Its arrays follow from the teacher's network and an example batch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..arguments import check_images, check_module, check_path
from ..errors import UserError, check_choice, shown
from ..map_options import MapOptions
from ..maps import make_options
from ..numerics import check_logits
from ..taps import evaluating, tap, try_stages
from ..teacher import Transform, split_transform
from .fingerprint import network_fingerprint
from .header import (
    CLASSES,
    LOGITS,
    ArrayEntry,
    Header,
    ImagesRecord,
    StageRecord,
    TeacherRecord,
    Views,
)
from .store import TeacherStore, normalized_map

Dtype = Literal["float16", "float32"]


def create_store(
    folder: str | os.PathLike[str],
    teacher: nn.Module,
    example: Tensor,
    *,
    images: int,
    views: int = 1,
    data: str = "",
    layers: Sequence[str] | None = None,
    kind: str = "sum",
    p: float = 2.0,
    axis: str = "space",
    dtype: Dtype = "float16",
    top_k: int | None = None,
    teacher_transform: Transform | None = None,
) -> TeacherStore:
    """The store of a teacher's outputs for fixed views of images; made if `folder` is new.

    An existing store is opened if it matches these arguments; maps that it lacks are added.

    Args:
        folder: the folder of the store; its parents are created.
        teacher: images (N, C, H, W) -> logits (N, K); its own preprocessing may be inside.
        example: a batch of training images, (N, C, H, W).
        images, views: the number of training images, and of fixed views of each.
        data: a text of your own that identifies the images and how their views are made.
        layers: the teacher's layers whose maps are kept; by default all its stages.
        kind, p, axis: of the maps, as in `attention_map`.
        dtype: of the values in the files.
        top_k: keep this many logits per image; the other classes share the rest evenly.
        teacher_transform: the teacher's preprocessing, such as a normalisation.

    Raises:
        UserError: (a ValueError) for wrong options, and for a folder that holds something else.
    """
    check_path(folder, "folder")
    check_module(teacher, "teacher")
    check_images(example, "example")
    check_choice("dtype", dtype, get_args(Dtype))
    for name, number in (("images", images), ("views", views)):
        if not isinstance(number, int) or number < 1:
            raise UserError(f"{name} is {shown(number)}: expected a whole number ≥ 1")
    names = tuple(getattr(teacher, "class_names", ()))
    network, transform = split_transform(teacher, teacher_transform, "teacher")
    classes = names or _numbered_classes(network, example, transform)
    fingerprint = network_fingerprint(network, transform)
    record = TeacherRecord(type(network).__name__, fingerprint, classes, bool(names))
    header = plan_store(
        network,
        example,
        record,
        ImagesRecord(data, data, images),
        {"views": views},
        layers,
        make_options(MapOptions, kind, p, axis),
        dtype,
        top_k,
        transform,
    )
    return TeacherStore.create(folder, header)


def plan_store(
    network: nn.Module,
    example: Tensor,
    teacher: TeacherRecord,
    images: ImagesRecord,
    views: Views,
    layers: Sequence[str] | None,
    options: MapOptions | None,
    dtype: Dtype,
    top_k: int | None,
    transform: Transform | None,
) -> Header:
    """The header of a store of a network; writes nothing.

    By default `layers` are all stages. Without `options` the store has logits only.

    Raises:
        UserError: for unknown layers, and a `top_k` that is not below the number of classes.
    """
    x = example
    if transform is not None:
        with torch.no_grad():
            x = transform(example)
    stages = try_stages(network, x)
    if layers is None:
        layers = [stage.name for stage in stages]
    rows = views["views"], images.count
    entries = _logit_entries(rows, len(teacher.classes), dtype, top_k)
    if options is not None:
        entries += _map_entries(network, x, layers, options, rows, dtype)
    records = tuple(StageRecord(s.name, s.shape, s.stride, s.depth) for s in stages)
    return Header(teacher, images, views, dtype, top_k, records, tuple(entries))


def _numbered_classes(
    network: nn.Module, example: Tensor, transform: Transform | None
) -> tuple[str, ...]:
    with evaluating(network):
        x = example if transform is None else transform(example)
        logits = check_logits(network(x), "the teacher")
    return tuple(str(k) for k in range(logits.shape[1]))


def _logit_entries(
    rows: tuple[int, int], classes: int, dtype: Dtype, top_k: int | None
) -> list[ArrayEntry]:
    if top_k is None:
        return [ArrayEntry(LOGITS, (*rows, classes), dtype)]
    if not isinstance(top_k, int) or not 1 <= top_k < classes:
        raise UserError(
            f"top_k is {top_k!r}: expected 1 to {classes - 1}, fewer than the {classes} classes"
        )
    return [
        ArrayEntry(LOGITS, (*rows, top_k + 1), dtype),
        ArrayEntry(CLASSES, (*rows, top_k), "int32"),
    ]


def _map_entries(
    network: nn.Module,
    x: Tensor,
    layers: Sequence[str],
    options: MapOptions,
    rows: tuple[int, int],
    dtype: Dtype,
) -> list[ArrayEntry]:
    attention = options.reads_attention
    with evaluating(network), tap(network, layers, attention=attention) as tapped:
        _, features = tapped(x)
    entries = []
    for layer, feature in features.items():
        shape = (*rows, *normalized_map(feature, options).shape[1:])
        entries.append(ArrayEntry(options.map_name(layer), shape, dtype, layer, options))
    return entries
