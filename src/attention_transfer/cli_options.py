"""The flags of `train` and `distill`, one for each key of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

MODEL_HELP = (
    "wrn-16-1, nin-thin, timm/NAME[:pretrained], torchvision/NAME[:pretrained] or FILE.py:FACTORY."
)
DATA_HELP = "digits, cifar10[:FOLDER], cifar100[:FOLDER], folder:PATH, parquet:PATH, wds:PATTERN or hub:OWNER/NAME."

Option = tuple[tuple[str, ...], dict[str, Any]]


def option(*names: str, **settings: Any) -> Option:
    return names, settings


METHOD_OPTIONS: list[Option] = [
    option("--method", help="none, at, kd, full, gradient, symmetry, min-l2, or a sum: at+kd."),
    option(
        "--teacher",
        help=f"A run folder (the authors' too), or a model with trained weights: {MODEL_HELP}",
    ),
    option(
        "--teacher-weights", help="A state dict for the teacher (.safetensors, .pt, .pth, .th)."
    ),
    option(
        "--beta",
        help="β, or METHOD=NUMBER,… where several have one. [at: 1000, full: 10000, others: 1]",
    ),
    option(
        "--decay",
        help="Schedule of β: constant, linear, cosine, step, warm-up or warm-up+linear, …; or METHOD=WORD,… "
        "(kd=linear is that of α). [constant; at+kd: linear]",
    ),
    option("--kind", help="Attention map: sum or max over channels. [sum]"),
    option("--p", type=float, help="Exponent of the map, p ≥ 1. [2]"),
    option("--norm", type=float, help="Order of ‖D‖ under --convention paper. [2]"),
    option("--convention", help="authors, paper or caffe. [authors]"),
    option("--resize", help="Where sizes differ: map, features or bilinear. [map]"),
    option(
        "--axis", help="space, or channel: maps over channels, for pairs of equal channels. [space]"
    ),
    option("--weights", help="A factor for each pair of layers, like 1,1,0.5. [1 each]"),
    option(
        "--squared/--no-squared",
        default=None,
        help="Of gradient and symmetry: ‖·‖², or ‖·‖. [squared]",
    ),
    option(
        "--pairs",
        help="auto; last2 (or lastN): its last two; or STUDENT_LAYER=TEACHER_LAYER,… [auto]",
    ),
    option("--alpha", type=float, help="Weight of distillation, 1 − α of the cross-entropy. [0.9]"),
    option("--temperature", type=float, help="Temperature of distillation. [4]"),
    option(
        "--second-order",
        help="How methods on input gradients are differentiated: auto, double-backward, func or forward-over-reverse "
        "(gradient, symmetry, min-l2). [auto]",
    ),
]
TRAINING_OPTIONS: list[Option] = [
    option("--data", help=DATA_HELP + " [digits]"),
    option(
        "--out",
        required=True,
        type=click.Path(path_type=Path),
        help="The run folder to write, or to continue.",
    ),
    option(
        "--recipe",
        help="A recipe of the package: cifar10-paper, cifar10-short, imagenet, finetune, …",
    ),
    option(
        "--config",
        type=click.Path(path_type=Path),
        help="A recipe file (YAML, these keys); flags override it.",
    ),
    option(
        "--student-weights",
        help="Start from a state dict, or from a RUN folder, on other data say: a head of other classes starts anew.",
    ),
    option("--epochs", type=int, help="Passes over the training images. [15]"),
    option("--batch-size", type=int, help="Images a step, over all devices. [128]"),
    option("--lr", type=float, help="Learning rate, the highest one. [0.2]"),
    option("--optimizer", help="sgd or adamw. [sgd]"),
    option("--momentum", type=float, help="SGD's momentum, AdamW's first β. [0.9]"),
    option("--nesterov/--no-nesterov", default=None, help="Nesterov's momentum, of SGD. [on]"),
    option("--weight-decay", type=float, help="[5e-4]"),
    option(
        "--weight-decay-on-norm/--no-weight-decay-on-norm",
        default=None,
        help="Whether norms and biases are decayed too. [on]",
    ),
    option(
        "--accumulate",
        type=int,
        help="Work through a batch in so many parts, one update for all: --batch-size, steps and schedules stay what "
        "they are, memory shrinks. Batch normalisation sees the parts. [1]",
    ),
    option(
        "--lr-reference-batch",
        type=int,
        help="--lr and --head-lr are for batches of so many: × --batch-size over this.",
    ),
    option("--clip-norm", type=float, help="Clip the norm of the gradient of all weights."),
    option(
        "--head-lr",
        type=float,
        help="The classifier's learning rate, where it is its own; scaled with --lr.",
    ),
    option(
        "--layer-decay",
        type=float,
        help="Rate of a layer over that of the next: 1 at the head. Layers are timm's own, or else the stages.",
    ),
    option(
        "--freeze-bn/--no-freeze-bn",
        default=None,
        help="Batch normalisation keeps its statistics. [off]",
    ),
    option("--label-smoothing", type=float, help="Of the cross-entropy's labels. [0]"),
    option(
        "--mixup",
        type=float,
        help="Mix images and labels in pairs: α of its Beta distribution. [0: off]",
    ),
    option(
        "--cutmix",
        type=float,
        help="As --mixup, by pasting; with both, one is drawn each batch. [0: off]",
    ),
    option(
        "--ema",
        type=float,
        help="Validate and keep a moving average of the weights, of this decay (0.999; lower in the first steps).",
    ),
    option("--schedule", help="step, one-cycle, cosine or constant. [one-cycle]"),
    option(
        "--warmup-epochs",
        type=float,
        help="Rise linearly to the scheduled rate; not with one-cycle. [0]",
    ),
    option("--lr-decay", type=float, help="Factor at each milestone of --schedule step. [0.2]"),
    option(
        "--milestones", help="Epochs, counted from 1, at whose start the rate drops. [60,120,160]"
    ),
    option(
        "--augment",
        help="crop: pad, crop and flip the centre; imagenet: torchvision's random resized crop of whole images and "
        "flip, streamed (validation: the centre 224 of 256). [crop]",
    ),
    option(
        "--crop-scale", help="Of --augment imagenet: shares of an image's area, LOW,HIGH. [0.08,1]"
    ),
    option("--crop-ratio", help="Of --augment imagenet: width to height, LOW,HIGH. [0.75,1.3333]"),
    option(
        "--crop-padding",
        type=int,
        help="Pixels of reflection around a random crop; 0: no crop. [4]",
    ),
    option("--flip/--no-flip", default=None, help="Random horizontal flips. [on; digits: off]"),
    option("--seed", type=int, help="[0]"),
    option(
        "--seeds",
        type=int,
        default=1,
        help="Run so many seeds, each in a folder seed-S of --out. [1]",
    ),
    option(
        "--at-once",
        type=int,
        default=1,
        help="Run so many seeds at a time, each with its share of the cores. [1]",
    ),
    option("--image-size", type=int, help="Height and width to bring images to."),
    option("--max-steps", type=int, help="End after so many steps."),
    option("--limit-train", type=int, help="So many training images, balanced over the classes."),
    option("--limit-val", type=int, help="So many validation images, balanced over the classes."),
    option(
        "--val-split",
        type=float,
        help="Validate on this share of train; the test set stays untouched. [0.1 of data without validation images]",
    ),
    option(
        "--on-bad-image", help="error, or skip: leave unreadable images out and count them. [error]"
    ),
    option("--stream", help="auto (where decoded images do not fit in memory), on or off. [auto]"),
    option("--workers", type=int, help="Processes that decode streamed images. [by the cores]"),
    option("--device", help="auto, cpu, cuda or mps. [auto]"),
    option("--precision", help="auto, fp32 or bf16 (autocast). [auto]"),
    option(
        "--compile",
        help="auto (where the run is long enough to earn it), on, off, or graphs (CUDA graphs). [auto]",
    ),
    option("--devices", type=int, help="Processes (GPUs) a node. [1]"),
    option("--nodes", type=int, help="[1]"),
    option(
        "--log",
        "--logger",
        "log",
        help="Log each epoch to csv, tensorboard or wandb too, or to several: csv,tensorboard; "
        "under torchrun write --logger.",
    ),
]
