"""The end of a run: weights, attention maps and summary."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..apply.evaluate import EVALUATION_BATCH, measure, predict_logits, save_predictions
from ..apply.inference import InferenceModel, profile
from ..apply.maps import attention_in_box, layer_names, save_maps
from ..data.dataset import Dataset
from ..errors import RunError, UserError, plural
from ..map_options import MapOptions
from ..models.network import Network, file_fingerprint, metadata, save_student
from ..run_folder import RunFolder, run_path, write_json
from ..runtime.resolve import RuntimeConfig
from ..store.store import TeacherStore
from .assemble import RunComponents

if TYPE_CHECKING:
    from ..config import Recipe


def finish(
    recipe: Recipe,
    folder: RunFolder,
    components: RunComponents,
    runtime: RuntimeConfig,
    rows: Sequence[dict[str, Any]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Writes the network, its maps, predictions and summary.json; returns the summary."""
    data, preprocess = components.data, components.student.preprocess
    device = next(components.transfer.parameters()).device
    student = components.inference(runtime).to(device).eval()
    size = preprocess.size or data.image_size
    about = metadata(recipe.model, data.classes, preprocess, size)
    save_student(folder.student_file, student.module, about)
    teacher = teacher_logits = teacher_summary = None
    if components.teacher is not None:
        module, transform = components.teacher.module, components.teacher.preprocess
        teacher = InferenceModel(module, transform, runtime.precision).to(device).eval()
        teacher_logits = _logits(teacher, data)
        teacher_summary = _summarize_teacher(components.teacher, teacher, teacher_logits, data)
        if components.teacher_store is not None:
            _record_numbers(components.teacher_store.store, teacher_summary)
    elif components.teacher_store is not None:
        teacher_summary = _summarize_store(components.teacher_store.store)
    attention = teacher_attention = None
    try:
        attention, teacher_attention = _save_maps(recipe, folder, data, student, teacher)
    except UserError as error:
        say(f"warning: the report has no attention maps: {error}")
    if teacher_summary is not None:
        teacher_summary["attention"] = teacher_attention
    # The saved predictions are those of the exported weights, in float32.
    logits = _logits(InferenceModel(student.module, preprocess, "fp32").eval(), data)
    save_predictions(folder.predictions_file, data.val, logits, teacher_logits)
    last = rows[-1]
    # An epoch that only repeated its validation has a rate of 0.
    rates = [row["images_per_second"] for row in rows if row["images_per_second"]]
    summary = {
        "command": recipe.command,
        "model": recipe.model,
        "method": recipe.method,
        "data": recipe.data,
        "seed": recipe.seed,
        "epochs": last["epoch"],
        "classes": list(data.classes),
        "final": {k: v for k, v in last.items() if k.startswith(("train_", "val_"))}
        | _exported_metrics(student, logits, data),
        "seconds": last["seconds"],
        "images_per_second": statistics.median_high(rates or [0.0]),
        "skipped_images": data.unreadable_count(),
        **profile(student, data.image_size),
        "teacher": teacher_summary,
        "attention": attention,
        "sha256": file_fingerprint(folder.student_file),
    }
    folder.previous_checkpoint_file.unlink(missing_ok=True)  # a finished run does not continue
    # Written last, because it marks the run as finished.
    write_json(folder.summary_file, summary)
    return summary


def _save_maps(
    recipe: Recipe,
    folder: RunFolder,
    data: Dataset,
    student: InferenceModel,
    teacher: InferenceModel | None,
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Writes the maps for the report.

    Returns:
        How well the attention of student and teacher agrees with the boxes, where there are any.

    Raises:
        UserError: if a map cannot be computed because the features are too large.
    """
    layers = layer_names(student, data.val)
    if layers:
        kinds = _shown_kind(recipe), _shown_kind(recipe.of_teacher)
        save_maps(folder.maps_file, student, layers, data.val, data.shown, teacher, kinds)
    in_box = attention_in_box(student, layers, data.val)
    if teacher is None:
        return in_box, None
    return in_box, attention_in_box(teacher, layer_names(teacher, data.val), data.val)


def _shown_kind(options: MapOptions) -> str:
    """The kind of the maps in the report: "sum", or "attention" if the run reads attention."""
    if options.reads_attention:
        return "attention"
    return "sum"


def _logits(network: InferenceModel, data: Dataset) -> Tensor:
    """Logits (N, K) of the validation images."""
    return predict_logits(network, data.val.to(network.device), EVALUATION_BATCH, network.device)


def _exported_metrics(student: InferenceModel, logits: Tensor, data: Dataset) -> dict[str, float]:
    """The metrics of the exported weights in float32; empty if training used float32."""
    if student.precision == "fp32":
        return {}
    return {f"val_{name}_fp32": value for name, value in measure(logits, data.val).items()}


def _summarize_teacher(
    teacher: Network, network: InferenceModel, logits: Tensor, data: Dataset
) -> dict[str, Any]:
    # Measured again, because this run may have other validation images than the teacher's run.
    metrics = measure(logits, data.val)
    return {
        "name": teacher.name,
        "folder": str(run_path(teacher.folder).resolve()) if teacher.folder else None,
        "model": teacher.name,
        **profile(network, data.image_size),
        "val_accuracy": metrics["accuracy"],
        "val_loss": metrics["loss"],
    }


def _record_numbers(store: TeacherStore, summary: dict[str, Any]) -> None:
    """Writes the teacher's numbers into the store, for later runs without its network."""
    keys = "parameters", "flops", "val_accuracy", "val_loss"
    with suppress(OSError, RunError):  # a full disk must not fail the run
        store.record({key: float(summary[key]) for key in keys})


def _summarize_store(store: TeacherStore) -> dict[str, Any]:
    """The summary of the teacher from its store, for a run without its network."""
    teacher = store.header.teacher
    about = {"name": teacher.name, "folder": teacher.folder, "model": teacher.name}
    return about | {"store": str(store.folder.resolve())} | teacher.numbers


def describe_summary(folder: RunFolder, summary: dict[str, Any]) -> str:
    """One line for a finished run.

    Raises:
        UserError: for a summary that lacks one of the numbers.
    """
    final = summary.get("final") or {}
    numbers = summary | final
    for key in ("val_accuracy", "val_loss", "epochs", "seconds", "images_per_second"):
        if numbers.get(key) is None:
            raise UserError(
                f"{folder.summary_file} is damaged: it lacks {key}; delete it, and the command "
                "writes it again"
            )
    precision = ""
    if (accuracy := final.get("val_accuracy_fp32")) is not None:
        precision = f" in bf16 ({100 * (1 - accuracy):.2f} % in fp32)"
    return (
        f"{100 * (1 - final['val_accuracy']):.2f} % error{precision}, loss {final['val_loss']:.3f} "
        f"after {plural(summary['epochs'], 'epoch')}, {summary['seconds'] / 60:.1f} min "
        f"at {summary['images_per_second']:,.0f} images/s"
    )
