"""The options of training: length, optimiser, schedule, labels, loggers; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ..errors import UserError, check_choice
from ..options import Bool, Float, Int, comma_separated, option

LOGGERS = ("csv", "tensorboard", "wandb", "mlflow")


@dataclass(frozen=True)
class TrainingOptions:
    """Length of training, batch size, seed, averaging."""

    epochs: Annotated[Int, option("Passes over the training images.", ge=1)] = 15
    batch_size: Annotated[Int, option("Images per step, over all devices.", ge=1)] = 128
    max_steps: Annotated[
        Int | None, option("Stop after this many steps.", ge=1, default_text="none")
    ] = None
    accumulate: Annotated[
        Int,
        option("Split each batch into N micro-batches (one optimiser step per batch).", ge=1),
    ] = 1
    seed: Annotated[
        Int,
        option(
            "Seed of weights, order, crops and the training subset.",
            ge=0,
            lt=1 << 63,
            expected="a whole number from 0 to 2^63 - 1",
        ),
    ] = 0
    freeze_bn: Annotated[Bool, option("Keep batch normalisation in eval mode.")] = False
    ema: Annotated[
        Float | None,
        option(
            "Validate and save a moving average of the weights with this decay, such as 0.999.",
            gt=0,
            lt=1,
            default_text="off",
        ),
    ] = None


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimiser and learning-rate schedule."""

    optimizer: Annotated[Literal["sgd", "adamw"], option("Optimiser.")] = "sgd"
    lr: Annotated[Float, option("Peak learning rate.", gt=0)] = 0.2
    momentum: Annotated[Float, option("Momentum of SGD, β₁ of AdamW.", ge=0)] = 0.9
    nesterov: Annotated[Bool, option("Nesterov momentum (SGD).")] = True
    weight_decay: Annotated[Float, option("Weight decay.", ge=0)] = 5e-4
    weight_decay_on_norm: Annotated[Bool, option("Also decay biases and normalisation.")] = True
    lr_reference_batch: Annotated[
        Int | None,
        option(
            "Batch size that --lr is for; the learning rate is scaled by --batch-size / N.",
            ge=1,
            default_text="no scaling",
        ),
    ] = None
    head_lr: Annotated[
        Float | None, option("Learning rate of the classifier.", gt=0, default_text="--lr")
    ] = None
    layer_decay: Annotated[
        Float | None,
        option(
            "Factor on the learning rate from each layer to the one before it (timm's layers, or "
            "the stages).",
            gt=0,
            le=1,
            default_text="1",
        ),
    ] = None
    clip_norm: Annotated[
        Float | None, option("Clip the norm of the whole gradient.", gt=0, default_text="off")
    ] = None
    schedule: Annotated[
        Literal["step", "one-cycle", "cosine", "constant"], option("Learning-rate schedule.")
    ] = "one-cycle"
    warmup_epochs: Annotated[
        Float, option("Epochs of linear warm-up (not with one-cycle).", ge=0)
    ] = 0.0
    milestones: Annotated[
        tuple[Annotated[Int, Field(ge=1)], ...],
        BeforeValidator(comma_separated),
        option(
            "With --schedule step: the rate drops at the start of these epochs, counted from 1.",
            expected="epochs from 1 up, like 60,120,160",
        ),
    ] = (60, 120, 160)
    lr_decay: Annotated[Float, option("With --schedule step: factor at each milestone.", ge=0)] = (
        0.2
    )


@dataclass(frozen=True)
class LabelOptions:
    """Label smoothing and mixed images."""

    label_smoothing: Annotated[
        Float, option("Label smoothing of the cross-entropy.", ge=0, lt=1)
    ] = 0.0
    mixup: Annotated[Float, option("Mixup: α of its Beta distribution; 0: off.", ge=0)] = 0.0
    cutmix: Annotated[
        Float, option("CutMix: α of its Beta distribution; with mixup, each batch draws one.", ge=0)
    ] = 0.0


@dataclass(frozen=True)
class LogOptions:
    """Loggers in addition to metrics.jsonl."""

    log: Annotated[
        str | None,
        option(
            f"{', '.join(LOGGERS)}, or several: csv,tensorboard.",
            default_text="none",
            changes_numbers=False,
            aliases=("--logger",),  # torchrun would take --log as its own flag
        ),
    ] = None


def check_training(
    training: TrainingOptions,
    optimizer: OptimizerOptions,
    labels: LabelOptions,
    views: int | None = None,
) -> None:
    """Raises `UserError` for options that do not go together."""
    if views is not None and (labels.mixup or labels.cutmix):
        raise UserError(
            "--views is given with --mixup or --cutmix, but a mixed image depends on its batch, "
            "so it has no fixed views: leave one of them out"
        )
    if training.accumulate > training.batch_size:
        raise UserError(
            f"accumulate is {training.accumulate}: "
            f"expected at most the batch size, {training.batch_size}"
        )
    if optimizer.optimizer == "sgd" and optimizer.nesterov and optimizer.momentum == 0:
        raise UserError("nesterov needs momentum above 0: raise it, or add --no-nesterov")
    if optimizer.optimizer == "adamw" and optimizer.momentum >= 1:
        raise UserError(f"momentum is {optimizer.momentum}: AdamW expects its first β below 1")
    if optimizer.warmup_epochs and optimizer.schedule == "one-cycle":
        raise UserError(
            "--warmup-epochs is given, but --schedule one-cycle has its own warm-up: "
            "choose another schedule"
        )


def logger_names(options: LogOptions) -> list[str]:
    """The loggers in `csv,tensorboard`, each once.

    Raises:
        UserError: for an unknown logger.
    """
    if options.log is None:
        return []
    names = comma_separated(options.log)
    for name in names:
        check_choice("logger", name, LOGGERS)
    return list(dict.fromkeys(names))
