"""Estimates the time of a plan's runs on this machine from a few steps of each kind of run."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import torch
from pydantic import RootModel
from rich.console import Console

from ..apply.inference import as_input
from ..config import Recipe
from ..data.dataset import Dataset
from ..data.open import list_images
from ..launch import Task
from ..models.create import create_model
from ..models.network import fixed_size, metadata, save_student
from ..models.trained import Preprocess
from ..run_folder import RunFolder, read_json, write_json
from ..runtime.process import make_fabric, set_up_process, use_threads
from ..runtime.resolve import resolve_runtime, synchronize
from ..second_order import BatchStatisticsWarning
from ..train.assemble import assemble, make_trainer
from ..train.images import open_images
from ..train.progress import ProgressBar
from ..train.regularize import training_mode
from ..train.trainer import Trainer

WARM_UP_STEPS = 1
STEPS = 3
VAL_IMAGES = 100
# The rest of a run: start, trial step, maps, measuring the network, report.
EXTRA_SECONDS = 20.0
# Options that change the time of a step; runs with equal options are of the same kind.
KIND_KEYS = (
    *("model", "method", "batch_size", "accumulate", "data", "image_size", "augment", "pairs"),
    *("device", "precision"),
)


@dataclass(frozen=True)
class Speed:
    """Seconds of a training step and of a validation image, in eager mode; the parameters."""

    step: float
    val_image: float
    parameters: int


class MeasuredSpeeds(RootModel[dict[str, Speed]]):
    """The file of `run_seconds`."""


def run_seconds(
    tasks: Iterable[Task], recipes: Mapping[str, Recipe], jobs: int, file: Path
) -> dict[Path, tuple[float, Speed]]:
    """Seconds and speed of each run, by folder, with `jobs` of them at the same time.

    Args:
        recipes: the recipes of all planned runs by folder, including teachers.
        file: caches the measurements, so that they are not repeated when a plan continues.
    """
    kept: dict[str, Any] = read_json(file, MeasuredSpeeds) or {}
    counts: dict[str, list[int]] = {}
    threads = max(1, torch.get_num_threads() // jobs)
    seconds = {}
    for task in tasks:
        recipe = task.recipe
        planned = recipes.get(recipe.teacher or "")  # none for a teacher that is trained already
        untrained = planned.model if planned else None
        options = [getattr(recipe, name) for name in KIND_KEYS]
        key = json.dumps([*options, untrained or recipe.teacher, threads])
        if key not in kept:
            kept[key] = vars(measure(recipe, untrained, threads))
            write_json(file, kept)
        speed = Speed(**kept[key])
        data = json.dumps([recipe.data, recipe.limit_train, recipe.limit_val, recipe.val_split])
        if data not in counts:
            counts[data] = [len(images) for images in list_images(recipe)]
        train, val = counts[data]
        steps_per_epoch = max(1, train // recipe.batch_size)
        steps = steps_per_epoch * recipe.epochs
        if recipe.max_steps is not None:
            steps = min(steps, recipe.max_steps)
        validations = math.ceil(steps / steps_per_epoch)  # one an epoch
        total = steps * speed.step + validations * val * speed.val_image + EXTRA_SECONDS
        seconds[task.folder.path] = total, speed
    return seconds


def measure(recipe: Recipe, untrained: str | None, threads: int) -> Speed:
    """Times a few steps of a run without writing it.

    The teacher runs in each step, even if the run will read a store. `untrained` is the model that
    replaces a teacher which has not been trained yet.
    """
    images = (STEPS + WARM_UP_STEPS) * recipe.batch_size
    recipe = replace(
        recipe,
        model=recipe.model.removesuffix(":pretrained"),
        student_weights=None,
        limit_train=min(images, recipe.limit_train or images),
        limit_val=VAL_IMAGES,
        views=None,
        store=None,
        compile="off",
        log=None,
    )
    with (
        use_threads(threads),
        tempfile.TemporaryDirectory() as folder,
        catch_warnings(action="ignore", category=BatchStatisticsWarning),  # each run prints it
    ):
        if untrained is not None:
            recipe = replace(recipe, teacher=str(Path(folder) / "teacher"))
            data = open_images(recipe, recipe.augment, recipe, recipe.seed)
            name = untrained.removesuffix(":pretrained")
            write_untrained_run(RunFolder(Path(folder) / "teacher"), name, data)
        return _measure(recipe, RunFolder(Path(folder) / "run"))


def write_untrained_run(folder: RunFolder, model: str, data: Dataset) -> None:
    """Writes a run folder whose network has random weights, which is as slow as a trained one."""
    torch.manual_seed(0)
    module = create_model(model, len(data.classes))
    preprocess = Preprocess(data.mean, data.std, fixed_size(module))
    size = preprocess.size or data.image_size
    folder.write_config({"command": "train", "model": model})
    about = metadata(model, data.classes, preprocess, size)
    save_student(folder.student_file, module, about)


def _measure(recipe: Recipe, folder: RunFolder) -> Speed:
    components = assemble(recipe)
    runtime = set_up_process(resolve_runtime(recipe))
    fabric = make_fabric(recipe, runtime)
    progress = ProgressBar(Console(quiet=True), "", recipe.epochs)
    trainer = make_trainer(recipe, folder, fabric, components, runtime, progress)
    training_mode(components.transfer, recipe.freeze_bn)
    plan = trainer.loader.epoch(recipe.seed, 0, trainer.batch_size)
    _train(trainer, plan, WARM_UP_STEPS)
    start = time.perf_counter()
    _train(trainer, plan, STEPS)
    step = (time.perf_counter() - start) / STEPS
    components.transfer.eval()
    start = time.perf_counter()
    with torch.no_grad():
        trainer.validate()
    val_image = (time.perf_counter() - start) / len(components.data.val)
    parameters = sum(p.numel() for p in components.student.module.parameters())
    return Speed(step, val_image, parameters)


def _train(trainer: Trainer, plan: Any, steps: int) -> None:
    for k in range(steps):
        # A small --limit-train may leave fewer steps in an epoch.
        batch = trainer.loader.batch(plan, k % trainer.steps_per_epoch)
        trainer.train_step(batch._replace(images=as_input(batch.images)), plan.view)
    synchronize(trainer.fabric.device)
