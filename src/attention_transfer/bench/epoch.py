"""`bench epoch`: a whole AT+KD epoch with augmentation, metrics and checkpoint.

The authors' epoch has their loader and meters. The images are the built-in digits, which have the
size of CIFAR-10's. Neither side validates.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from ..apply.inference import as_input
from ..config import make_recipe
from ..data.images import ImageSet
from ..data.plan import TrainingBatch
from ..models.create import create_model
from ..run_folder import RunFolder
from ..train.assemble import assemble, make_trainer
from ..train.progress import ProgressBar
from .authors import authors_step
from .measure import interleave, report, timed
from .options import BenchOptions
from .workload import start


def run(options: BenchOptions, console: Console, json_file: Path | None) -> None:
    """An epoch of a run, its training step alone, and the authors' epoch."""
    runtime, fabric = start(options)
    with tempfile.TemporaryDirectory() as temporary:
        weights = Path(temporary) / "teacher.pt"
        torch.save(create_model(options.teacher, 10).state_dict(), weights)
        recipe = make_recipe(
            {
                "command": "distill",
                "model": options.student,
                "teacher": options.teacher,
                "teacher_weights": str(weights),
                "method": "at+kd",
                "data": "digits",
                "limit_train": options.images,
                "epochs": 1000,  # more than the rounds
                "batch_size": options.batch_size,
                "schedule": "constant",
                "lr": 0.01,  # low, so that the loss stays finite
            }
        )
        components = assemble(recipe)
        images = components.data.train
        assert isinstance(images, ImageSet), "the digits are in memory"
        quiet = ProgressBar(Console(quiet=True), "", 1)
        folder = RunFolder(Path(temporary) / "run")
        trainer = make_trainer(recipe, folder, fabric, components, runtime, quiet)
        # The authors' loop in the subprocess does not validate either.
        trainer.validate = lambda: {"loss": 0.0, "accuracy": 0.0}
        first = slice(0, options.batch_size)
        x = as_input(images.batch(first).to(fabric.device))
        batch = TrainingBatch(x, images.labels[first].to(fabric.device), images.rows[first])

        def epoch() -> float:
            start = time.perf_counter()
            trainer.train_epoch()
            seconds = time.perf_counter() - start
            return trainer.steps_per_epoch * trainer.batch_size / seconds

        def step() -> None:
            trainer.train_step(batch)
            trainer.step -= 1  # do not count this step

        steps = trainer.steps_per_epoch
        data = (images.images.cpu().numpy(), images.labels.cpu().numpy())
        with authors_step(replace(options, steps=steps), fabric.device, data) as authors:
            measures = {
                "authors": authors,
                "step": timed(step, steps, options.batch_size, fabric.device),
                "epoch": epoch,
            }
            rows = interleave(measures, options.rounds)
    report("epoch", rows, options, runtime, console, json_file)
