"""A run's network for other programs: safetensors, a PyTorch or ONNX graph, or the authors' files.

`pt2` and `onnx` hold preprocessing and network as one graph: images (N, 3, H, W), RGB, in [0, 1] at
the run's own size, N free -> logits (N, classes). `safetensors` and `authors` hold weights alone;
their metadata say how an image becomes the network's input. Weights are float32, whatever the run's
precision.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..authors_log import EXTRA_KEY, LOG_FILE, LOG_PREFIX, MODEL_FILE, is_authors_run
from ..errors import UserError, check_choice, first_line
from ..models.network import Network, load_trained, metadata, save_student
from ..models.wrn import WideResNet
from ..outputs import check_output
from ..run_folder import RunFolder, replacing

FORMATS = ("safetensors", "onnx", "pt2", "authors")
METADATA_FILE = "attention_transfer.json"  # inside a pt2 file
METADATA_KEY = "attention_transfer"  # of an ONNX model
# (the authors' key, our key, factor): their accuracies are in percent.
AUTHORS_METRICS = (
    ("train_loss", "train_loss", 1),
    ("train_acc", "train_accuracy", 100),
    ("test_loss", "val_loss", 1),
    ("test_acc", "val_accuracy", 100),
)


def export_run(
    run: Path, form: str, out: Path, force: bool = False, trust_code: bool = False
) -> None:
    """Writes the network of a run, ours or the authors', to `out`: a file, or for authors a folder.

    Args:
        force: replace a file of a run, or one of another format.
        trust_code: the run may name a network FILE.py:FACTORY.

    Raises:
        UserError: for an unknown format, a folder without a finished run, an `out` that is taken,
            a network that the format cannot hold, and a missing extra.
    """
    check_choice("format", form, FORMATS)
    if form == "authors":
        _check_new_folder(out)
    else:
        check_output("--out", out, form, force)
    network = load_trained(run, trust_code)
    name, classes, preprocess = network.name, network.classes, network.preprocess
    assert preprocess.size is not None, "a trained network knows its size"
    about = metadata(name, classes, preprocess, preprocess.size)
    if form in ("onnx", "pt2"):
        about["input"] = graph_input(*preprocess.size)
    if form == "authors":
        _save_authors(network, about, run, out)
    elif form == "onnx":
        _save_onnx(network, about, out)
    elif form == "pt2":
        _save_pt2(network, about, out)
    else:
        save_student(out, network.module, name, classes, preprocess, preprocess.size)


def graph_input(height: int, width: int) -> str:
    """What the graph of `onnx` and `pt2` takes, in the words of its metadata."""
    return (
        f"images (N, 3, {height}, {width}), RGB, in [0, 1]; normalisation by mean and std is inside"
    )


def _check_new_folder(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        text = f"--out {out} is a folder with something in it"
        raise UserError(f"{text}: for the format authors name a new folder")
    for path in (out, *out.absolute().parents):
        if path.exists() and not path.is_dir():
            raise UserError(
                f"--out {out}: {path} is a file: for the format authors name a new folder"
            )


def _export_graph(network: Network, image_size: list[int]) -> torch.export.ExportedProgram:
    """Preprocessing and network as one graph with a free batch size."""
    module = nn.Sequential(network.preprocess, network.module).eval().requires_grad_(False)
    example = torch.rand(2, 3, *image_size)  # a batch of 1 would be taken for a constant
    shapes = ({0: torch.export.Dim("batch")},)
    try:
        return torch.export.export(module, (example,), dynamic_shapes=shapes)
    except Exception as error:  # tracing raises nearly anything on a network that it cannot follow
        raise UserError(_failure(network, "as a graph", error)) from error


def _failure(network: Network, kind: str, error: Exception) -> str:
    return f"{network.name} cannot be exported {kind}: {type(error).__name__}: {first_line(error)}"


def _save_pt2(network: Network, about: dict[str, Any], out: Path) -> None:
    extra_files = {METADATA_FILE: json.dumps(about)}
    # A stream, because torch.export.save warns of file names that do not end in .pt2.
    stream = io.BytesIO()
    torch.export.save(_export_graph(network, about["image_size"]), stream, extra_files=extra_files)
    with replacing(out) as partial:
        partial.write_bytes(stream.getvalue())


def _save_onnx(network: Network, about: dict[str, Any], out: Path) -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format onnx needs {' and '.join(missing)}: pip install 'attention-transfer[onnx]'"
        )
    graph = _export_graph(network, about["image_size"])
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    names["dynamic_shapes"] = ({0: "batch"},)  # otherwise the free axis is called s31
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(graph, dynamo=True, verbose=False, **names)
    except Exception as error:
        raise UserError(_failure(network, "to ONNX", error)) from error
    assert program is not None
    program.model.metadata_props[METADATA_KEY] = json.dumps(about)
    program.model.graph.inputs[0].doc_string = about["input"]
    with replacing(out) as partial:
        program.save(partial, external_data=False)


def _save_authors(network: Network, about: dict[str, Any], run: Path, out: Path) -> None:
    """Writes `model.pt7` and `log.txt`, a line per epoch, as the authors' script does for a WRN.

    The log also has our metadata: the authors have one recipe, this run may have other classes,
    another normalisation and another size.
    """
    folder, module = RunFolder(run), network.module
    if is_authors_run(run) and not folder.exists:
        raise UserError(f"{run} is a run of the authors' script already: copy it")
    if not isinstance(module, WideResNet):
        raise UserError(
            f"the format authors is for wrn-DEPTH-WIDTH only, {run} holds {network.name}: "
            "choose another"
        )
    config, rows = folder.config(), folder.metrics() or [{}]
    params = _authors_params(module)
    options = _authors_options(module, config)
    options["n_parameters"] = sum(p.numel() for p in params.values())
    # Their script loads the state of an optimiser, whose momentum starts at 0.
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
            log.write(f"{LOG_PREFIX} {json.dumps(options | _authors_epoch(row))}\n")


def _authors_params(module: WideResNet) -> dict[str, Tensor]:
    """The tensors by the authors' names, in their order."""
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


def _authors_options(module: WideResNet, config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the authors' script, as far as this run has them."""
    data = str(config.get("data"))
    datasets = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
    milestones = list(config.get("milestones", ()))
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


def _authors_epoch(row: Mapping[str, Any]) -> dict[str, Any]:
    """An epoch's numbers by the authors' names, with α and β as they were in effect."""
    weights = row.get("weights", {})
    # With several methods the key of β is at.beta; with one it is beta, which may be another's.
    beta = weights.get("beta", 0) if "at" in row.get("parts", {}) else 0
    epoch = {"alpha": weights.get("alpha", 0), "epoch": row.get("epoch", 0)}
    if not any(key.startswith("beta[") or ".beta[" in key for key in weights):
        # Their log has one β; "auto" has one for each pair.
        epoch["beta"] = weights.get("at.beta", beta)
    for theirs, ours, factor in AUTHORS_METRICS:
        if ours in row:
            epoch[theirs] = factor * row[ours]
    return epoch
