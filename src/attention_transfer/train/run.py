"""One run: from a recipe to a finished run folder."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from rich.console import Console
from torch import Tensor, nn

from ..apply.evaluate import EVALUATION_BATCH, evaluate
from ..apply.inference import InferenceModel, as_input, profile
from ..apply.maps import attention_in_box, save_maps
from ..checks.preflight import DRY_IMAGES, preflight
from ..checks.teacher import TEACHER_IMAGES
from ..config import Recipe
from ..data import (
    VAL_RESIZE,
    Augment,
    Dataset,
    Images,
    ImageSet,
    Stream,
    balanced_subset,
    make_transform,
    memory_budget,
    open_data,
    default_workers,
)
from ..errors import UserError
from ..methods import create_methods
from ..models import (
    Network,
    check_network,
    load_network,
    run_fingerprint,
    save_student,
    start_network,
)
from ..run_folder import RunFolder, write_json
from ..runtime.cuda_graphs import CudaGraphs
from ..runtime.resolve import (
    RuntimeConfig,
    count_flops,
    environment,
    keep_malloc_arena,
    resolve_runtime,
)
from ..second_order import BatchStatisticsWarning
from ..taps import parse_pairs
from ..transfer import Transfer
from .loggers import check_loggers, logging_to
from .optimizer import describe_rates, make_average, make_mix, training_mode
from .progress import ProgressBar
from .resume import check_folder, check_teacher
from .trainer import Trainer

PREFLIGHT_BATCH = 100
GPU_SHARE = 0.4
AT_ONCE = "ATTENTION_TRANSFER_AT_ONCE"  # so many runs share this machine (launch.py)


@dataclass
class RunComponents:
    """What a run is made of, all checked before anything is written."""

    data: Dataset
    student: Network
    teacher: Network | None
    transfer: Transfer
    example: Tensor  # as the student sees it
    said: Sequence[str] = ()  # where the student starts from
    average: Any = None

    @property
    def trained(self) -> nn.Module:
        """What is validated and kept: the student, or the moving average of its weights."""
        return self.student.module if self.average is None else self.average.module


def run(recipe: Recipe, out: str | Path, console: Console) -> dict[str, Any]:
    """Trains what the recipe says into folder `out`, or continues it, or finds it finished; its summary.

    Raises:
        UserError: for a folder that holds something else, and whatever is wrong with data, networks and options.
        RunError: for a loss that is not finite and a full disk.
        Interrupted: (a KeyboardInterrupt) after the state was saved.
    """
    folder = RunFolder(out)
    check_folder(folder, recipe)
    check_loggers(recipe)
    if (summary := folder.summary()) is not None:
        check_teacher(folder, run_fingerprint(recipe.teacher) if recipe.teacher else None)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            done = f"{folder} is finished: {describe(summary)}; nothing to do"
            console.print(done, markup=False, highlight=False, soft_wrap=True)
        return summary
    parts = assemble(recipe, folder.environment().get("streamed"))
    check_teacher(folder, parts.teacher.fingerprint if parts.teacher else None)
    # Second derivatives are cheaper eager, by the convolutions of ops/convolution.py (results/gradient.md).
    compilable = not any(m.needs_gradient for m in parts.transfer.methods)
    flops = _training_flops(recipe, parts)
    decisions = decisions_for(recipe, flops, folder.environment().get("auto"), compilable)
    fabric = make_fabric(recipe, decisions)
    progress = ProgressBar(
        console if fabric.is_global_zero else Console(quiet=True), title(recipe), recipe.epochs
    )
    loop = prepare(recipe, folder, fabric, parts, decisions, progress)
    _announce(recipe, parts, decisions, loop, progress)
    if not folder.checkpoint_file.is_file():
        _preflight(parts, loop, progress)
    if (
        fabric.is_global_zero
    ):  # a run that was refused so far leaves nothing in the way of the next try
        _write_down(recipe, folder, parts, decisions)
    with (
        logging_to(recipe, folder, progress.say, fabric.is_global_zero) as loop.log,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", BatchStatisticsWarning)  # said before the first step
        rows = loop.run()
    fabric.barrier()
    if not fabric.is_global_zero:
        return {}
    if (found := parts.data.unreadable_count() - parts.data.skipped) > 0:
        progress.say(f"warning: {found} unreadable images were met and left out")
    summary = _finish(recipe, folder, parts, decisions, rows)
    progress.say(f"{folder}: {describe(summary)}")
    return summary


def _write_down(
    recipe: Recipe, folder: RunFolder, parts: RunComponents, decisions: RuntimeConfig
) -> None:
    """config.yaml and environment.json of a new run; of one that continues, only what is decided otherwise now."""
    before = folder.environment()
    if before and folder.exists and folder.checkpoint_file.is_file():
        if before.get("auto") != decisions.to_dict():
            write_json(folder.environment_file, before | {"auto": decisions.to_dict()})
        return
    folder.write_config(recipe.to_dict())
    about = environment(decisions, [Path(sys.argv[0]).name, *sys.argv[1:]])
    teacher = parts.teacher
    found = {"teacher": teacher and teacher.fingerprint, "streamed": parts.data.streamed}
    write_json(folder.environment_file, about | found)


def decisions_for(
    recipe: Recipe,
    training_flops: float,
    earlier: dict[str, Any] | None = None,
    compilable: bool = True,
) -> RuntimeConfig:
    """What `auto` means for this run, and the process set up accordingly."""
    decisions = resolve_runtime(recipe, training_flops, earlier, compilable)
    torch.set_num_threads(decisions.threads)
    keep_malloc_arena()
    return decisions


class AutocastAlone(MixedPrecision):
    """bfloat16 by autocast; what goes in keeps its precision: images, mixed labels, the progress of schedules."""

    def convert_input(self, data: Any) -> Any:
        return data


def make_fabric(recipe: Recipe, decisions: RuntimeConfig) -> Fabric:
    """The launched Fabric of a run: its devices, processes and autocast."""
    for name in ("lightning.fabric", "lightning.pytorch"):  # Fabric speaks through either
        logging.getLogger(name).setLevel(logging.WARNING)
    # Inductor looks for CUDA's compiler and complains where there is no GPU to go with it.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    bf16 = decisions.precision == "bf16"
    fabric = Fabric(
        accelerator=decisions.device,
        devices=recipe.devices,
        num_nodes=recipe.nodes,
        strategy="ddp" if recipe.devices * recipe.nodes > 1 else "auto",
        precision=None if bf16 else "32-true",
        plugins=[AutocastAlone("bf16-mixed", decisions.device)] if bf16 else None,
    )
    fabric.launch()
    return fabric


def title(recipe: Recipe) -> str:
    return recipe.model if recipe.command == "train" else f"{recipe.method} {recipe.model}"


def describe(summary: dict[str, Any]) -> str:
    """One line for a finished run."""
    final = summary["final"]
    return (
        f"{100 * (1 - final['val_accuracy']):.2f} % error, loss {final['val_loss']:.3f} "
        f"after {summary['epochs']} epochs, {summary['seconds'] / 60:.1f} min "
        f"at {summary['images_per_second']:,.0f} images/s"
    )


def assemble(recipe: Recipe, streamed: bool | None = None) -> RunComponents:
    """`streamed`, where a run continues, is whether its images were."""
    data = _open(recipe, streamed)
    methods = create_methods(recipe)
    teacher = None
    if recipe.teacher is not None and any(m.needs_teacher for m in methods):
        teacher = load_network(
            recipe.teacher, data.classes, data.mean, data.std, recipe.teacher_weights
        )
    torch.manual_seed(recipe.seed)
    student, said = start_network(
        recipe.model, data.classes, data.mean, data.std, recipe.student_weights
    )
    module = student.module.to(memory_format=torch.channels_last)
    average = make_average(recipe, module)  # a copy, made before the Transfer taps the student
    example = as_input(data.train.batch(slice(0, 2)))
    check_network(student, example, f"the student {recipe.model}")
    if teacher is not None:
        check_network(teacher, example, f"the teacher {recipe.teacher}")
    transfer = Transfer(
        module,
        None if teacher is None else teacher.module.to(memory_format=torch.channels_last),
        methods,
        parse_pairs(recipe.pairs),
        example,
        student_transform=student.preprocess,
        teacher_transform=None if teacher is None else teacher.preprocess,
        label_smoothing=recipe.label_smoothing,
    )
    seen = student.preprocess(example)
    return RunComponents(data, student, teacher, transfer, seen, said, average)


def _open(recipe: Recipe, streamed: bool | None) -> Dataset:
    """The data of a run. On a GPU resident images lie in its memory, and leave most of it to the training."""
    stream = recipe.stream
    if stream == "auto" and (streamed is not None or recipe.augment == "imagenet"):
        stream = "off" if streamed is False else "on"
    on_gpu = recipe.device in ("auto", "cuda") and torch.cuda.is_available()
    workers, at_once = recipe.workers, int(os.environ.get(AT_ONCE, "1"))
    if workers is None:
        workers = default_workers(on_cpu=not on_gpu, processes=recipe.devices * at_once)
    room = []
    if on_gpu:
        free = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))[0]
        room.append(int(GPU_SHARE * free) // at_once)
    if (share := memory_budget()) is not None:
        room.append(share // (recipe.devices * at_once))
    return open_data(
        recipe,
        stream=stream,
        workers=workers,
        seed=recipe.seed,
        val_resize=VAL_RESIZE if recipe.augment == "imagenet" else 1.0,
        memory=min(room, default=None),
    )


def _training_flops(recipe: Recipe, parts: RunComponents) -> float:
    """Of the whole run: the student's forward and twice that backward, the teacher's forward."""
    example = as_input(parts.data.train.batch(slice(0, 1)))
    images = recipe.epochs * len(parts.data.train)
    if recipe.max_steps is not None:
        images = min(images, recipe.max_steps * recipe.batch_size)
    each = 3 * count_flops(parts.student.module.eval(), parts.student.preprocess(example))
    if parts.transfer.teacher is not None and parts.teacher is not None:
        each += count_flops(parts.transfer.teacher, parts.teacher.preprocess(example))
    return float(each * images)


def prepare(
    recipe: Recipe,
    folder: RunFolder,
    fabric: Fabric,
    parts: RunComponents,
    decisions: RuntimeConfig,
    progress: ProgressBar,
) -> Trainer:
    told = fabric.all_reduce(
        torch.tensor(float(parts.data.streamed), device=fabric.device), reduce_op="sum"
    )
    if told not in (0, fabric.world_size):
        raise UserError("some processes have memory for all images and others not: say --stream on")
    val = parts.data.val.to(fabric.device)
    augment = _augment(recipe, fabric, parts.data.train)
    network: nn.Module = InferenceModel(
        parts.trained, parts.student.preprocess, decisions.precision
    )
    parts.transfer.to(fabric.device)
    parts.trained.to(fabric.device)
    if decisions.compile:
        # Compiled code is kept by function: what earlier runs of this process left would count against the limit.
        torch.compiler.reset()
        parts.transfer.compile(**decisions.compile_options())
        network = torch.compile(network, dynamic=False)  # type: ignore[assignment]

    def validate() -> dict[str, float]:
        return evaluate(network, val, EVALUATION_BATCH, fabric.device)

    return Trainer(
        recipe, folder, fabric, parts.transfer, augment, validate, progress,
        example=parts.example.to(fabric.device), mix=make_mix(recipe, len(parts.data.classes)), average=parts.average,
        graphs=CudaGraphs() if decisions.graphs else None,
    )  # fmt: skip


def _augment(recipe: Recipe, fabric: Fabric, images: Images) -> Augment | Stream:
    """What makes the batches of an epoch."""
    if isinstance(images, ImageSet):
        return Augment(images.to(fabric.device), recipe.crop_padding, recipe.flip)
    transform = make_transform(recipe, images.size)
    return Stream(images, transform, fabric.device, fabric.global_rank, fabric.world_size)


def _announce(
    recipe: Recipe,
    parts: RunComponents,
    decisions: RuntimeConfig,
    loop: Trainer,
    progress: ProgressBar,
) -> None:
    mode = "CUDA graphs" if decisions.graphs else "compiled" if decisions.compile else "eager"
    how = f"{decisions.device}, {decisions.precision}, {mode}, {decisions.threads} threads"
    data = parts.data
    progress.say(
        f"{title(recipe)} on {recipe.data}: {len(data.train)} training and {len(data.val)} validation images, "
        f"{loop.total_steps} steps; {how}; "
        f"{loop.augment.describe(loop.batch_size)}"
    )
    for note in data.notes:
        progress.say(note)
    if data.skipped:
        progress.say(f"warning: {data.skipped} unreadable images were left out")
    for line in (*parts.said, *describe_rates(recipe, loop.optimizer)):
        progress.say(f"  {line}")
    example = as_input(data.train.batch(slice(0, 2)).to(loop.fabric.device))
    features = parts.transfer.features(example)
    for method in parts.transfer.methods:
        for line in method.describe(parts.transfer.pairs, *features):
            progress.say(f"  {line}")
        for warning in method.warnings(loop.total_steps):
            progress.say(f"warning: {warning}")


def _preflight(parts: RunComponents, loop: Trainer, progress: ProgressBar) -> None:
    """Says what a dry step finds before the first one; an error ends the run."""
    data, device = parts.data, loop.fabric.device
    shown = balanced_subset(data.train.labels, DRY_IMAGES, seed=0)
    x = as_input(data.train.batch(shown).to(device))
    training_mode(parts.transfer, loop.recipe.freeze_bn)
    with loop.fabric.autocast():
        found = preflight(
            parts.transfer,
            x,
            data.train.labels[shown].to(device),
            images=_validation_batches(data.val),
            teacher_accuracy=_own_accuracy(parts.teacher),
        )
    for finding in found:
        if finding.level != "error":
            progress.say(f"{finding.level}: {finding.text}")
    if errors := [f.text for f in found if f.level == "error"]:
        raise UserError("; ".join(errors))


def _validation_batches(images: Images) -> Iterator[tuple[Tensor, Tensor]]:
    """Balanced over the classes, and each batch as far as it can be."""
    chosen = balanced_subset(images.labels, TEACHER_IMAGES, seed=0)
    count = -(-len(chosen) // PREFLIGHT_BATCH)
    for k in range(count):
        part = images.subset(chosen[k::count])
        yield as_input(part.batch(slice(None))), part.labels


def _own_accuracy(teacher: Network | None) -> float | None:
    """A teacher's validation accuracy at the end of its own run, where that is known."""
    summary = (
        RunFolder(teacher.folder).summary() if teacher is not None and teacher.folder else None
    )
    return summary["final"].get("val_accuracy") if summary else None


def _finish(
    recipe: Recipe,
    folder: RunFolder,
    parts: RunComponents,
    decisions: RuntimeConfig,
    rows: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Weights, maps and summary; the summary last, since it says that the run is finished."""
    data, device = parts.data, next(parts.transfer.parameters()).device
    student = (
        InferenceModel(parts.trained, parts.student.preprocess, decisions.precision)
        .to(device)
        .eval()
    )
    layers = [s.name for s in student.stages(data.image_size)]
    size = parts.student.preprocess.size or data.image_size
    save_student(
        folder.student_file,
        student.module,
        recipe.model,
        data.classes,
        parts.student.preprocess,
        size,
    )
    if layers:
        save_maps(folder.maps_file, student, layers, data.val)
    final = {k: v for k, v in rows[-1].items() if k.startswith(("train_", "val_"))}
    rates = sorted(r["images_per_second"] for r in rows if r["images_per_second"]) or [0.0]
    summary: dict[str, Any] = {
        "command": recipe.command,
        "model": recipe.model,
        "method": recipe.method,
        "data": recipe.data,
        "seed": recipe.seed,
        "epochs": rows[-1]["epoch"],
        "classes": list(data.classes),
        "final": final,
        "seconds": rows[-1]["seconds"],
        "images_per_second": rates[len(rates) // 2],
        "skipped_images": data.unreadable_count(),
        **profile(student, data.image_size),
        "teacher": None,
        "attention": attention_in_box(student, layers, data.val),
    }
    if (teacher := parts.teacher) is not None:
        network = (
            InferenceModel(teacher.module, teacher.preprocess, decisions.precision)
            .to(device)
            .eval()
        )
        before = RunFolder(teacher.folder).summary() if teacher.folder else None
        summary["teacher"] = {
            "name": teacher.name,
            "folder": str(Path(teacher.folder).resolve()) if teacher.folder else None,
            "model": teacher.name,
            **profile(network, data.image_size),
            "val_accuracy": evaluate(network, data.val.to(device), EVALUATION_BATCH, device)[
                "accuracy"
            ],
            "val_loss": before["final"]["val_loss"] if before else None,
        }
    write_json(folder.summary_file, summary)
    return summary
