"""What a run prints before its first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..apply.inference import as_input
from ..errors import plural
from ..methods.options import TEACHER_METHOD
from ..runtime.resolve import RuntimeConfig
from .assemble import RunComponents
from .optimizer import describe_rates
from .shares import describe_left_out
from .trainer import Trainer

if TYPE_CHECKING:
    from ..config import Recipe

# Explains the methods that a command uses by default.
DEFAULT_METHODS = {
    TEACHER_METHOD: "the default with a teacher",
    "none": "the student alone, the default without a teacher",
}


def run_title(recipe: Recipe) -> str:
    """The network, preceded by the method if there is one."""
    if recipe.method == "none":
        return recipe.model
    return f"{recipe.method} {recipe.model}"


def announce(
    recipe: Recipe, components: RunComponents, runtime: RuntimeConfig, trainer: Trainer
) -> None:
    """Prints what is trained, on which images, how, and what the method does to each pair."""
    say, data, transfer = trainer.progress.say, components.data, components.transfer
    mode = "compiled" if runtime.compile else "eager"
    if runtime.graphs:
        mode = "CUDA graphs"
    say(
        f"{run_title(recipe)} on {recipe.data}: {len(data.train)} training and "
        f"{len(data.val)} validation images, {plural(trainer.total_steps, 'step')}; "
        f"{runtime.device}, {runtime.precision}, {mode}, {plural(runtime.threads, 'thread')}; "
        f"{trainer.loader.describe(trainer.batch_size)}"
    )
    if recipe.command == "distill" and recipe.method in DEFAULT_METHODS:
        say(f"  method {recipe.method}: {DEFAULT_METHODS[recipe.method]}")
    for note in data.notes:
        say(note)
    if (warning := describe_left_out(trainer.batch_size, trainer.fabric.world_size)) is not None:
        say(f"warning: {warning}")
    if data.skipped:
        say(f"warning: {data.skipped} unreadable images were left out")
    rates = describe_rates(recipe, recipe.batch_size, trainer.optimizer)
    for line in (*components.notes, *rates):
        say(f"  {line}")
    x = as_input(data.train.batch(slice(0, 2)).to(trainer.fabric.device))
    student_features, teacher_features = transfer.features(x)
    for method in transfer.methods:
        for line in method.describe(transfer.pairs, student_features, teacher_features):
            say(f"  {line}")
        for warning in method.warnings(trainer.total_steps):
            say(f"warning: {warning}")
