"""Exports a run's network as the files of the authors' script: `model.pt7` and `log.txt`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..authors_log import EXTRA_KEY, LOG_FILE, LOG_PREFIX, MODEL_FILE, is_authors_run
from ..errors import UserError
from ..models.network import Network
from ..models.wrn import WideResNet
from ..run_folder import RunFolder, replacing

# (the authors' key, our key, factor): their accuracies are in percent.
AUTHORS_METRICS = (
    ("train_loss", "train_loss", 1),
    ("train_acc", "train_accuracy", 100),
    ("test_loss", "val_loss", 1),
    ("test_acc", "val_accuracy", 100),
)


def save_authors(network: Network, about: dict[str, Any], run: Path, out: Path) -> None:
    """Writes `model.pt7` and `log.txt`, a line per epoch, as the authors' script does for a WRN.

    The log also has our metadata, because this run may have other classes, another normalisation
    and another size than the authors' recipe.
    """
    folder, module = RunFolder(run), network.module
    if is_authors_run(run) and not folder.exists:
        raise UserError(f"{run} is already a run of the authors' script: copy it")
    if not isinstance(module, WideResNet):
        raise UserError(
            f"the format authors is for wrn-DEPTH-WIDTH only, {run} holds {network.name}: "
            "choose another"
        )
    config, rows = folder.config(), folder.metrics() or [{}]
    params = _params(module)
    options = _options(module, config)
    options["n_parameters"] = sum(p.numel() for p in params.values())
    # Their script loads the state of an optimiser: the momentum is 0.
    optimizer = torch.optim.SGD(
        [p for name, p in params.items() if "running_" not in name],
        options["lr"],
        momentum=config.get("momentum", 0.9),
        weight_decay=options["weight_decay"],
    )
    epoch = rows[-1].get("epoch", 0)
    with replacing(out / MODEL_FILE) as partial:
        content = {"params": params, "optimizer": optimizer.state_dict(), "epoch": epoch}
        torch.save(content, partial)
    options[EXTRA_KEY] = about
    with replacing(out / LOG_FILE) as partial, open(partial, "w") as log:
        for row in rows:
            log.write(f"{LOG_PREFIX} {json.dumps(options | _epoch(row))}\n")


def _params(module: WideResNet) -> dict[str, Tensor]:
    """The tensors under the authors' names, in their order."""
    layers: dict[str, nn.Module | None] = {"conv0": module.conv0}
    for g, group in enumerate((module.group0, module.group1, module.group2)):
        for b, block in enumerate(group):
            for name in ("conv0", "conv1", "bn0", "bn1", "convdim"):
                layers[f"group{g}.block{b}.{name}"] = getattr(block, name)
    layers |= {"bn": module.bn, "fc": module.fc}
    params = {}
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d):
            params[name] = layer.weight
        elif layer is not None:  # a block may have no convdim
            for key in ("weight", "bias", "running_mean", "running_var"):
                if hasattr(layer, key):
                    params[f"{name}.{key}"] = getattr(layer, key)
    return {name: tensor.detach().cpu().clone() for name, tensor in params.items()}


def _options(module: WideResNet, config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the authors' script that this run has."""
    data = str(config.get("data"))
    datasets = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
    milestones = list(config.get("milestones", ()))
    # A WRN has 6n + 4 layers, with n blocks in each group, and 64 × width features.
    return {
        "depth": 6 * len(module.group0) + 4,
        "width": module.fc.in_features // 64,
        "dataset": datasets.get(data.partition(":")[0], data),
        "batch_size": config.get("batch_size"),
        "lr": config.get("lr", 0.1),
        "epochs": config.get("epochs"),
        "weight_decay": config.get("weight_decay", 5e-4),
        "epoch_step": json.dumps(milestones, separators=(",", ":")),
        "lr_decay_ratio": config.get("lr_decay"),
        "teacher_id": Path(config.get("teacher") or "").name,
        "temperature": config.get("temperature"),
        "num_classes": module.fc.out_features,
    }


def _epoch(row: Mapping[str, Any]) -> dict[str, Any]:
    """An epoch's numbers under the authors' names, with α and β in that epoch."""
    weights = row.get("weights", {})
    # With several methods the key of β is at.beta; with one method, AT or another, it is beta.
    beta = weights.get("beta", 0) if "at" in row.get("parts", {}) else 0
    epoch = {"alpha": weights.get("alpha", 0), "epoch": row.get("epoch", 0)}
    if not any(key.startswith("beta[") or ".beta[" in key for key in weights):
        # Their log has one β, but "auto" has one for each pair.
        epoch["beta"] = weights.get("at.beta", beta)
    for theirs, ours, factor in AUTHORS_METRICS:
        if ours in row:
            epoch[theirs] = factor * row[ours]
    return epoch
