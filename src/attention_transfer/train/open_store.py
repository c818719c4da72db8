"""Opens the store of a run: given as its teacher, or filled by its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..apply.inference import as_input
from ..data.dataset import Dataset, Images
from ..data.options import AugmentOptions
from ..errors import UserError
from ..map_options import MapOptions
from ..methods.base import Method, can_learn_from_store
from ..methods.check import maps_to_read
from ..models.network import Network, check_classes
from ..models.start import load_network
from ..store.create import plan_store
from ..store.fingerprint import teacher_record
from ..store.header import Header, ImagesRecord, default_folder, is_store, view_options
from ..store.options import PrecisionOptions
from ..store.store import TeacherStore
from ..taps import evaluating, parse_pairs, resolve_pairs, tap
from ..teacher import TeacherOutput
from .images import make_loader

if TYPE_CHECKING:
    from ..config import Recipe

Pairs = list[tuple[str, str]]


@dataclass
class OpenStore:
    """A store with the arrays that the methods read, and the pairs of layers."""

    store: TeacherStore
    pairs: Pairs
    example: TeacherOutput  # the stored outputs for the example images
    missing: int  # views of images that the run needs and the store lacks
    note: str


def load_teacher(recipe: Recipe, data: Dataset) -> Network | None:
    """The teacher's network; None without a teacher, and with a store in its place."""
    if recipe.teacher is None or is_store(recipe.teacher):
        return None
    classes = data.classes, data.mean, data.std
    return load_network(
        recipe.teacher, *classes, recipe.teacher_weights, trust_code=recipe.trust_code
    )


def open_store(
    recipe: Recipe,
    data: Dataset,
    student: Network,
    teacher: Network | None,
    methods: Sequence[Method],
    index: Tensor,
) -> OpenStore | None:
    """The store of a run; None if the run uses no store.

    Args:
        index: the example images.

    Raises:
        UserError: for a store of other images, views or teachers, and for missing outputs if there
            is no teacher to compute them.
    """
    fills_store = recipe.views is not None and can_learn_from_store(methods)
    if not fills_store and not is_store(recipe.teacher):
        return None
    options, pairs = maps_to_read(methods), parse_pairs(recipe.pairs)
    example = as_input(data.train.batch(index))
    x, layers = student.preprocess(example), Pairs()
    if teacher is None:
        store = store_as_teacher(str(recipe.teacher), data)
        if options is not None:
            layers = resolve_pairs(pairs, student.module, store.stages(options), x, x)
        store = store.select([t for _, t in layers], options)
    else:
        if options is not None:
            inputs = x, teacher.preprocess(example)
            layers = resolve_pairs(pairs, student.module, teacher.module, *inputs)
        names = [t for _, t in layers]
        header = plan_for(recipe, recipe, data, teacher, example, names, options)
        folder = default_folder(header) if recipe.store is None else Path(recipe.store)
        store = TeacherStore.create(folder, header).select(names, options)
    outputs = example_outputs(store, recipe, data.train, index, teacher)
    views = views_of(recipe)
    missing, total = store.count_missing(data.train.rows, views), len(data.train) * len(views)
    # There are no outputs for images that cannot be read.
    if teacher is None and (missing == total or (missing and recipe.on_bad_image != "skip")):
        raise UserError(
            f"{store.folder} lacks {missing} of the {total} views of images that this run needs: "
            "fill it with the same command (attention-transfer teach)"
        )
    return OpenStore(store, layers, outputs, missing, _describe(store, data, len(views), missing))


def views_of(recipe: Recipe) -> range:
    """The views that a run trains on."""
    assert recipe.views is not None, "a store needs fixed views"
    # Epoch e shows view e mod V, so a run of fewer epochs never reaches the last views.
    return range(min(recipe.views, recipe.epochs))


def plan_for(
    options: PrecisionOptions,
    augment: AugmentOptions,
    data: Dataset,
    teacher: Network,
    example: Tensor,
    layers: Sequence[str] | None,
    map_options: MapOptions | None,
) -> Header:
    """Plans the store of a teacher's outputs for views of the training images.

    Args:
        layers: the teacher's layers whose maps are stored; None for all its stages.
    """
    return plan_store(
        teacher.module,
        example,
        teacher_record(teacher),
        images_record(data),
        view_options(augment),
        layers,
        map_options,
        options.store_dtype,
        options.top_k,
        teacher.preprocess,
    )


def example_outputs(
    store: TeacherStore,
    augment: AugmentOptions,
    images: Images,
    index: Tensor,
    teacher: Network | None,
) -> TeacherOutput:
    """The stored outputs for view 0 of the images at `index`; the teacher adds them if missing.

    β = "auto" is computed from these outputs. Since they come from the store, β is the same in a
    run that fills the store and in one that only reads it.
    """
    rows = images.rows[index]
    stored = store.read_if_filled(rows)
    if stored is not None:
        return stored
    if teacher is None:  # some of the images cannot be read
        return store.sample(len(index))
    loader = make_loader(augment, images, "cpu")
    x, _, rows = loader.batch(loader.view_plan(0, index, len(index)), 0)
    inputs = teacher.preprocess(as_input(x))
    module, attention = teacher.module, store.reads_attention
    with evaluating(module), tap(module, store.layers, inputs, attention=attention) as tapped:
        return store.add(rows, 0, *tapped(inputs))


def store_as_teacher(folder: str, data: Dataset) -> TeacherStore:
    """Opens a store that is given as the teacher.

    Raises:
        UserError: if it has other images or classes.
    """
    store = TeacherStore(folder)
    header = store.header
    header.check_same_images(store.folder, images_record(data))
    teacher = header.teacher
    name = f"the teacher of {folder}"
    check_classes(teacher.classes, data.classes, teacher.has_class_names, name)
    return store


def _describe(store: TeacherStore, data: Dataset, views: int, missing: int) -> str:
    """One line: the folder, the size that this run needs, and the share already computed."""
    header = store.header
    needed = len(data.train) * views
    size = header.bytes * needed / (header.images.count * header.view_count)
    return (
        f"the teacher's outputs for {views} views of {len(data.train)} images are "
        f"stored in {store.folder} ({size / 1e6:,.1f} MB, {header.dtype}); "
        f"{1 - missing / needed:.0%} are computed already"
    )


def images_record(data: Dataset) -> ImagesRecord:
    """The record of the training images of a store."""
    height, width = data.image_size
    return ImagesRecord(data.spec, data.fingerprint, data.record.images, (height, width))
