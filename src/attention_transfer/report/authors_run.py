"""Reads a run of the authors' scripts for the report, from its log only."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..authors_log import EXTRA_KEY, LOG_FILE, read_epochs
from ..errors import UserError
from .load_run import LoadedRun, finite_number, get_nested

# Settings that are fixed in the scripts.
FIXED = {
    "optimizer": "sgd", "momentum": 0.9, "nesterov": False, "schedule": "step",
    "lr_reference_batch": None, "command": "train", "method": "none",
}  # fmt: skip
# (our key, the authors')
OPTIONS = (
    ("epochs", "epochs"), ("batch_size", "batch_size"), ("lr", "lr"),
    ("weight_decay", "weight_decay"), ("lr_decay", "lr_decay_ratio"),
)  # fmt: skip


def read_authors_run(folder: Path) -> LoadedRun:
    """The options, epochs and results in the log of an authors' run.

    Raises:
        UserError: without a log, or with one that has no statistics.
    """
    log = folder / LOG_FILE
    if not log.is_file():
        raise UserError(f"{folder} has no {LOG_FILE}: expected a run of the authors' script")
    epochs = read_epochs(log)
    options = epochs[0] if epochs else {}
    run = LoadedRun(folder, _config(folder, options, epochs))
    # A run that was continued after a crash logged some epochs twice.
    by_epoch = {row["epoch"]: row for row in map(_metrics, epochs)}
    run.metrics = list(by_epoch.values())
    last = run.metrics[-1] if run.metrics else {}
    planned = finite_number(options.get("epochs"))
    if planned is not None and (last.get("epoch") or 0) >= planned:
        run.summary = _summary(run, options)
    return run


def _config(folder: Path, options: dict[str, Any], epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """The options under our names."""
    config: dict[str, Any] = FIXED | {"model": _model(options)}
    config |= {ours: options[theirs] for ours, theirs in OPTIONS if theirs in options}
    config["data"] = str(options.get("dataset") or "imagenet").lower()
    try:
        config["milestones"] = json.loads(options["epoch_step"])
    except (KeyError, TypeError, ValueError):
        config["milestones"] = None
    teacher = options.get("teacher_id") or options.get("teacher_params")
    # α and β may decay, so take the largest value of all epochs.
    weights = {}
    for name in ("alpha", "beta"):
        weights[name] = max((finite_number(e.get(name)) or 0.0 for e in epochs), default=0.0)
    methods = [name for name, weight in (("at", "beta"), ("kd", "alpha")) if weights[weight]]
    if teacher or methods:
        config |= {"command": "distill", "method": "+".join(methods) or "none"}
    if teacher:
        beside = folder.parent / str(teacher)
        config["teacher"] = str(beside if beside.is_dir() else teacher)
    if "at" in methods:
        config["beta"] = weights["beta"]
    if "kd" in methods:
        config |= {"alpha": weights["alpha"], "temperature": options.get("temperature")}
    return config


def _model(options: dict[str, Any]) -> str:
    named = get_nested(options, EXTRA_KEY, "model")
    if named:
        return str(named)
    depth, width = options.get("depth", "?"), options.get("width", "?")
    # The script of ImageNet has no option `dataset`.
    return f"wrn-{depth}-{width}" if "dataset" in options else f"resnet-{depth}"


def _metrics(epoch: dict[str, Any]) -> dict[str, Any]:
    """An epoch's metrics under our names; the ImageNet script logs top-1 and top-5 accuracy."""
    number = finite_number(epoch.get("epoch"))
    row: dict[str, Any] = {"epoch": None if number is None else int(number)}
    for ours, theirs in (("train_loss", "train_loss"), ("val_loss", "test_loss")):
        row[ours] = finite_number(epoch.get(theirs))
    for part, theirs in (("train", "train_acc"), ("val", "test_acc")):
        percents = epoch.get(theirs)
        if not isinstance(percents, list):
            percents = [percents]
        for name, percent in zip(("accuracy", "top5"), percents, strict=False):
            if finite_number(percent) is not None:
                row[f"{part}_{name}"] = percent / 100
    row["seconds"] = (finite_number(epoch.get("train_time")) or 0.0) + (
        finite_number(epoch.get("test_time")) or 0.0
    )
    return row


def _summary(run: LoadedRun, options: dict[str, Any]) -> dict[str, Any]:
    final = {k: v for k, v in run.metrics[-1].items() if k.startswith(("train_", "val_"))}
    seconds = sum(row["seconds"] for row in run.metrics)
    return {
        "final": final,
        "model": run.model,
        "parameters": _parameters(run.model, options),
        "seconds": seconds or None,
    }


def _parameters(model: str, options: dict[str, Any]) -> int | None:
    """The number of weights of a WRN, from the log.

    The log counts the running statistics of batch normalisation with them: two numbers a channel.
    """
    wrn = re.fullmatch(r"wrn-(\d+)-(\d+)", model)
    logged = finite_number(options.get("n_parameters"))
    if wrn is None or logged is None:
        return None
    depth, width = map(int, wrn.groups())
    blocks = (depth - 4) // 6
    channels, normalised = 16, 0
    for outputs in (16 * width, 32 * width, 64 * width):
        normalised += channels + (2 * blocks - 1) * outputs
        channels = outputs
    return int(logged) - 2 * (normalised + channels)
