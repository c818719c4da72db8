"""Makes the components of a run from its recipe, and the trainer from the components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from ..apply.evaluate import EVALUATION_BATCH, evaluate
from ..apply.inference import InferenceModel, as_input
from ..data.dataset import Dataset
from ..data.images import balanced_subset
from ..errors import UserError
from ..methods.registry import create_methods
from ..models.network import Network
from ..models.start import check_network, start_network
from ..run_folder import RunFolder
from ..runtime.process import compile_transfer
from ..runtime.resolve import RuntimeConfig, count_flops
from ..taps import parse_pairs
from ..transfer import Transfer
from .images import make_loader, open_images
from .open_store import OpenStore, load_teacher, open_store
from .progress import ProgressBar
from .regularize import make_average, make_mix
from .stored_outputs import StoredOutputs
from .trainer import Trainer

if TYPE_CHECKING:
    from ..config import Recipe

EXAMPLE_IMAGES = 32


@dataclass
class RunComponents:
    """The data and networks of a run, checked before anything is written."""

    data: Dataset
    student: Network
    teacher: Network | None
    transfer: Transfer
    example: Tensor  # a batch after the student's preprocessing
    notes: Sequence[str] = ()  # where the student's weights come from
    average: Any = None
    teacher_store: OpenStore | None = None  # the stored outputs of the teacher

    @property
    def trained(self) -> nn.Module:
        """The module that is validated and saved: the student, or the average of its weights."""
        if self.average is None:
            return self.student.module
        module: nn.Module = self.average.module
        return module

    @property
    def teacher_fingerprint(self) -> str | None:
        """The fingerprint of the teacher's weights, if they are known."""
        if self.teacher is not None:
            return self.teacher.fingerprint
        if self.teacher_store is not None:
            return self.teacher_store.store.header.teacher.identity
        return None

    def inference(self, runtime: RuntimeConfig) -> InferenceModel:
        """The trained module with its preprocessing."""
        return InferenceModel(self.trained, self.student.preprocess, runtime.precision)


def assemble(recipe: Recipe, data: Dataset | None = None) -> RunComponents:
    """Makes the networks and their `Transfer`; opens the data unless it is given.

    Raises:
        UserError: for data, networks or layers that do not exist or do not fit together.
    """
    if data is None:
        data = open_images(recipe, recipe.augment, recipe, recipe.seed)
    methods = create_methods(recipe)
    classes = data.classes, data.mean, data.std
    teacher = load_teacher(recipe, data)
    # The seed is set after the teacher is made, because its initialisation draws random numbers.
    torch.manual_seed(recipe.seed)
    student, notes = start_network(
        recipe.model, *classes, recipe.student_weights, recipe.trust_code
    )
    student_module = student.module.to(memory_format=torch.channels_last)
    # The average copies the student, so it must be made before the Transfer adds hooks.
    average = make_average(recipe, student_module)
    # Balanced over the classes: the first images of a folder all have the same class.
    examples = balanced_subset(data.train.labels, EXAMPLE_IMAGES, seed=0)
    example = as_input(data.train.batch(examples))
    check_network(student, example, f"the student {recipe.model}")
    if teacher is not None:
        check_network(teacher, example, f"the teacher {recipe.teacher}")
        teacher.module.to(memory_format=torch.channels_last)
    pairs: str | list[tuple[str, str]] = parse_pairs(recipe.pairs)
    store = open_store(recipe, data, student, teacher, methods, examples)
    teacher_side: Any = None
    transform = example_teacher = None
    if teacher is not None:
        teacher_side, transform = teacher.module, teacher.preprocess
    if store is not None:
        pairs, example_teacher, notes = store.pairs, store.example, [*notes, store.note]
        if not store.missing:
            # The store has all outputs, so the teacher need not be moved to the device.
            teacher_side, transform = store.store, None
    transfer = Transfer(
        student_module,
        teacher_side,
        methods,
        pairs,
        example,
        student_transform=student.preprocess,
        teacher_transform=transform,
        label_smoothing=recipe.label_smoothing,
        example_teacher=example_teacher,
    )
    student_example = student.preprocess(example)
    return RunComponents(data, student, teacher, transfer, student_example, notes, average, store)


def training_flops(recipe: Recipe, components: RunComponents) -> float:
    """FLOPs of the whole run; the backward pass of the student costs two forward passes."""
    example = as_input(components.data.train.batch(slice(0, 1)))
    images = recipe.epochs * len(components.data.train)
    if recipe.max_steps is not None:
        images = min(images, recipe.max_steps * recipe.batch_size)
    student, teacher = components.student, components.teacher
    per_image = 3 * count_flops(student.module.eval(), student.preprocess(example))
    total = float(per_image * images)
    if teacher is not None:
        times = images
        if components.teacher_store is not None:
            times = min(times, components.teacher_store.missing)
        total += times * count_flops(teacher.module.eval(), teacher.preprocess(example))
    return total


def make_trainer(
    recipe: Recipe,
    folder: RunFolder,
    fabric: Fabric,
    components: RunComponents,
    runtime: RuntimeConfig,
    progress: ProgressBar,
) -> Trainer:
    """The trainer of a run, its networks on the device and compiled if `runtime.compile` is set."""
    streamed = torch.tensor(float(components.data.streamed), device=fabric.device)
    if fabric.all_reduce(streamed, reduce_op="sum") not in (0, fabric.world_size):
        raise UserError("the images fit in memory on some ranks only: pass --stream on")
    val = components.data.val.to(fabric.device)
    rank, world = fabric.global_rank, fabric.world_size
    loader = make_loader(recipe, components.data.train, fabric.device, rank, world)
    network: nn.Module = components.inference(runtime)
    transfer = components.transfer.to(fabric.device)
    # The average of the weights is not part of the transfer.
    components.trained.to(fabric.device)
    if runtime.compile:
        # The compiler's limit of recompilations counts the earlier runs of this process as well.
        torch.compiler.reset()
        compile_transfer(transfer, runtime)
        network = torch.compile(network, dynamic=False)  # type: ignore[assignment]
    validate = partial(evaluate, network, val, EVALUATION_BATCH, fabric.device)
    trainer = Trainer(
        recipe,
        recipe,
        folder,
        fabric,
        transfer,
        loader,
        validate,
        progress,
        example=components.example.to(fabric.device),
        mix=make_mix(recipe, len(components.data.classes)),
        average=components.average,
        graphs=runtime.graphs,
    )
    if components.teacher_store is not None:
        trainer.teacher_outputs = StoredOutputs(
            components.teacher_store.store, transfer, fabric, progress.say
        )
    return trainer
