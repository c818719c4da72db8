"""The end of a run: weights, attention maps and summary."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..apply.evaluate import EVALUATION_BATCH, evaluate
from ..apply.inference import InferenceModel, profile
from ..apply.maps import attention_in_box, save_maps
from ..data import Dataset
from ..models.network import Network, save_student
from ..run_folder import RunFolder, write_json
from ..runtime.resolve import RuntimeConfig
from .assemble import RunComponents

if TYPE_CHECKING:
    from ..config import Recipe


def finish(
    recipe: Recipe,
    folder: RunFolder,
    components: RunComponents,
    runtime: RuntimeConfig,
    rows: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Writes student.safetensors, maps.npz and summary.json; returns the summary."""
    data, preprocess = components.data, components.student.preprocess
    device = next(components.transfer.parameters()).device
    student = components.inference(runtime).to(device).eval()
    size = preprocess.size or data.image_size
    save_student(folder.student_file, student.module, recipe.model, data.classes, preprocess, size)
    layers = [stage.name for stage in student.stages(data.image_size)]
    if layers:
        save_maps(folder.maps_file, student, layers, data.val)
    teacher_summary = None
    if components.teacher is not None:
        teacher_summary = _summarize_teacher(components.teacher, data, runtime)
    last = rows[-1]
    # An epoch that only repeated its validation trained no image.
    rates = [row["images_per_second"] for row in rows if row["images_per_second"]]
    summary = {
        "command": recipe.command,
        "model": recipe.model,
        "method": recipe.method,
        "data": recipe.data,
        "seed": recipe.seed,
        "epochs": last["epoch"],
        "classes": list(data.classes),
        "final": {k: v for k, v in last.items() if k.startswith(("train_", "val_"))},
        "seconds": last["seconds"],
        "images_per_second": statistics.median_high(rates or [0.0]),
        "skipped_images": data.unreadable_count(),
        **profile(student, data.image_size),
        "teacher": teacher_summary,
        "attention": attention_in_box(student, layers, data.val),
    }
    # Last of all files, because it marks the run as finished.
    write_json(folder.summary_file, summary)
    return summary


def _summarize_teacher(teacher: Network, data: Dataset, runtime: RuntimeConfig) -> dict[str, Any]:
    network = InferenceModel(teacher.module, teacher.preprocess, runtime.precision)
    network = network.to(runtime.device).eval()
    # Again, because this run may validate on other images than the teacher's own run.
    metrics = evaluate(network, data.val.to(network.device), EVALUATION_BATCH, network.device)
    folder = recorded = None
    if teacher.folder:
        folder = str(Path(teacher.folder).resolve())
        recorded = RunFolder(teacher.folder).summary()
    return {
        "name": teacher.name,
        "folder": folder,
        "model": teacher.name,
        **profile(network, data.image_size),
        "val_accuracy": metrics["accuracy"],
        "val_loss": recorded["final"]["val_loss"] if recorded else None,
    }


def describe_summary(summary: dict[str, Any]) -> str:
    """One line for a finished run."""
    final = summary["final"]
    return (
        f"{100 * (1 - final['val_accuracy']):.2f} % error, loss {final['val_loss']:.3f} "
        f"after {summary['epochs']} epochs, {summary['seconds'] / 60:.1f} min "
        f"at {summary['images_per_second']:,.0f} images/s"
    )
