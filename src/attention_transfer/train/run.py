"""Trains one run: from a recipe to a finished run folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings

from rich.console import Console

from ..run_folder import RunFolder, remove_partial_files, write_json
from ..runtime import ranks
from ..runtime.environment import environment
from ..runtime.process import (
    deterministic_algorithms,
    local_rank,
    make_fabric,
    set_up_process,
    use_threads,
)
from ..runtime.resolve import RuntimeConfig, resolve_runtime
from ..second_order import BatchStatisticsWarning
from . import resume
from .announce import announce, run_title
from .assemble import RunComponents, assemble, make_trainer, training_flops
from .dry_step import dry_step
from .finish import describe_summary, finish
from .loggers import Loggers, check_loggers
from .progress import ProgressBar
from .signals import explain_interrupt

if TYPE_CHECKING:
    from ..config import Recipe

# Writes a picture of the attention maps in a run folder; returns whether it has any.
DrawMaps = Callable[[RunFolder, Path], bool]


def run(
    recipe: Recipe,
    out: str | Path,
    console: Console,
    jobs: int = 1,
    draw_maps: DrawMaps | None = None,
) -> dict[str, Any]:
    """Trains by the recipe into folder `out`, or continues there; returns the summary.

    A finished run is not redone. Ranks other than 0 return an empty dictionary.

    Args:
        jobs: number of runs that share this machine.
        draw_maps: writes a picture of the attention maps in a run folder for the loggers.

    Raises:
        UserError: for a folder with other content or one that another process is writing to,
            and for wrong data, networks or options.
        RunError: for a loss that is not finite, a full disk, and a folder removed during the run.
        Interrupted: (a KeyboardInterrupt) after a signal, once the state is saved.
    """
    devices, nodes = ranks.resolve_processes(recipe)
    recipe = replace(recipe, devices=devices, nodes=nodes)
    folder = RunFolder(out)
    recipe = resume.check_folder(folder, recipe)
    loggers = check_loggers(recipe)
    if (summary := folder.summary()) is not None:
        resume.check_finished(folder, recipe)
        if local_rank() == 0:
            folder.lock.remove_abandoned()
            with suppress(OSError):  # the folder may be read-only
                remove_partial_files(folder.path)
            text = f"{folder} is finished: {describe_summary(folder, summary)}; nothing to do"
            console.out(text)
        return summary
    with ExitStack() as stack:
        stack.enter_context(explain_interrupt(folder))
        # Before `join`, so that a locked folder starts no other process.
        if ranks.global_rank() == 0:
            stack.enter_context(folder.lock)
            remove_partial_files(folder.path)
        ranks.join(recipe)
        stack.enter_context(ranks.propagate_failures())
        stack.enter_context(deterministic_algorithms(recipe.deterministic))
        # A run that continues has the number of threads of its start, the next run has its own.
        stack.enter_context(use_threads())
        return _train(recipe, folder, loggers, console, jobs, draw_maps)


def _train(
    recipe: Recipe,
    folder: RunFolder,
    loggers: list[str],
    console: Console,
    jobs: int,
    draw_maps: DrawMaps | None,
) -> dict[str, Any]:
    """Trains to the end and writes the files of a finished run; returns the summary."""
    components = assemble(recipe, resume.open_run_images(recipe, folder, jobs))
    resume.check_teacher(folder, components.teacher_fingerprint)
    runtime = _resolve(recipe, folder, components)
    fabric = make_fabric(recipe, set_up_process(runtime))
    if not fabric.is_global_zero:
        console, loggers = Console(quiet=True), []
    progress = ProgressBar(console, run_title(recipe), recipe.epochs)
    trainer = make_trainer(recipe, folder, fabric, components, runtime, progress)
    announce(recipe, components, runtime, trainer)
    if (warning := resume.describe_processes(folder, recipe)) is not None:
        progress.say(f"warning: {warning}")
    if not folder.has_checkpoint:
        dry_step(components, trainer)
    # Only after all checks, so that a refused run leaves no folder that would block the next one.
    if fabric.is_global_zero:
        _record(recipe, folder, components, runtime)

    with Loggers(loggers, folder, recipe.to_dict(), progress.say) as logs:
        trainer.log = logs.write
        with (
            resume.allow_changed_images(folder, fabric.is_global_zero),
            # The dry step has printed it.
            catch_warnings(action="ignore", category=BatchStatisticsWarning),
        ):
            rows = trainer.train()
        fabric.barrier()
        if not fabric.is_global_zero:
            return {}
        if (count := components.data.unreadable_count() - components.data.skipped) > 0:
            progress.say(f"warning: {count} unreadable images were left out during training")
        folder.lock.check()
        summary = finish(recipe, folder, components, runtime, rows, progress.say)
        folder.lock.check()
        if draw_maps is not None:
            logs.show_maps(rows[-1]["step"], lambda file: draw_maps(folder, file))
    progress.say(f"{folder}: {describe_summary(folder, summary)}")
    return summary


def _resolve(recipe: Recipe, folder: RunFolder, components: RunComponents) -> RuntimeConfig:
    return resolve_runtime(
        recipe,
        training_flops(recipe, components),
        folder.environment().get("auto"),
        # Second derivatives are faster in eager mode with ops/convolution.py (results/gradient.md).
        compilable=not any(method.needs_gradient for method in components.transfer.methods),
        accumulate=recipe.accumulate,
    )


def _record(
    recipe: Recipe, folder: RunFolder, components: RunComponents, runtime: RuntimeConfig
) -> None:
    """Writes config.yaml and environment.json; a run that continues updates runtime and data."""
    earlier = folder.environment()
    current = {"auto": asdict(runtime), "data": asdict(components.data.record)}
    if earlier and folder.has_checkpoint:
        # Versions and command stay those of the start.
        if earlier | current != earlier:
            write_json(folder.environment_file, earlier | current)
        return
    folder.write_config(recipe.to_dict())
    record = environment(runtime) | current
    record |= {"teacher": components.teacher_fingerprint, "streamed": components.data.streamed}
    if components.teacher_store is not None:
        record["store"] = str(components.teacher_store.store.folder.resolve())
    write_json(folder.environment_file, record)
