"""A run's network for other programs: safetensors, a PyTorch or ONNX graph, or the authors' files.

`pt2` and `onnx` hold preprocessing and network as one graph: images in [0, 1], (N, 3, H, W) at the run's own size, N
free -> logits (N, classes). The weights are in float32 whatever the precision of the run was.
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

from ..errors import UserError, check_choice
from ..models import Network, load_trained, save_student
from ..models.authors_files import EXTRA_KEY, LOG_FILE, LOG_PREFIX, MODEL_FILE, is_authors_run
from ..models.network import metadata
from ..models.wrn import WideResNet
from ..run_folder import RunFolder, replacing

FORMATS = ("safetensors", "onnx", "pt2", "authors")
METADATA = "attention_transfer.json"  # in a pt2 file; `attention_transfer` in the others


def export_run(run: Path, form: str, out: Path) -> None:
    """Writes the network of a run (ours or the authors') to `out`: a file, or of `authors` a folder.

    Raises:
        UserError: where `run` is no finished run, for `authors` of another network than a WRN, for a missing extra,
            for an `out` that is a folder with something in it or a file of the run itself.
    """
    check_choice("format", form, FORMATS)
    network = load_trained(run)
    _check_place(run, form, out)
    if form == "safetensors":
        preprocess = network.preprocess
        save_student(out, network.module, network.name, network.classes, preprocess, _size(network))
    elif form == "authors":
        _save_authors(network, run, out)
    else:
        {"pt2": _save_pt2, "onnx": _save_onnx}[form](network, out)


def _check_place(run: Path, form: str, out: Path) -> None:
    if form == "authors" and out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is a folder with something in it" if out.is_dir() else "is a file"
        raise UserError(f"--out {out} {what}: for the format authors name a new folder")
    if form != "authors" and out.is_dir():
        raise UserError(f"--out {out} is a folder: for the format {form} name a file")
    own = [*vars(RunFolder(run)).values(), run / MODEL_FILE, run / LOG_FILE]
    if out.resolve() in {file.resolve() for file in own}:
        raise UserError(f"--out {out} is the run's own: choose another file")


def _size(network: Network) -> tuple[int, int]:
    assert network.preprocess.size is not None, "a trained network knows its size"
    return network.preprocess.size


def _about(network: Network) -> dict[str, Any]:
    return metadata(network.name, network.classes, network.preprocess, _size(network))


def _program(network: Network) -> torch.export.ExportedProgram:
    """Preprocessing and network as one graph with a free batch size."""
    module = nn.Sequential(network.preprocess, network.module).eval().requires_grad_(False)
    example = torch.rand(2, 3, *_size(network))  # a batch of 1 would be taken for a constant
    try:
        return torch.export.export(
            module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    except Exception as error:
        # PyTorch's tracing raises nearly anything on a network that it cannot follow.
        raise UserError(
            f"{network.name} cannot be exported as a graph: {_first_line(error)}"
        ) from error


def _save_pt2(network: Network, out: Path) -> None:
    stream = io.BytesIO()  # `torch.export.save` would warn of the temporary file's name
    torch.export.save(
        _program(network), stream, extra_files={METADATA: json.dumps(_about(network))}
    )
    with replacing(out) as partial:
        partial.write_bytes(stream.getvalue())


def _save_onnx(network: Network, out: Path) -> None:
    absent = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(
            f"--format onnx needs {' and '.join(absent)}: pip install 'attention-transfer[onnx]'"
        )
    program = _program(network)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = torch.onnx.export(
                program, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
            )
    except Exception as error:
        raise UserError(
            f"{network.name} cannot be exported to ONNX: {_first_line(error)}"
        ) from error
    assert graph is not None
    graph.model.metadata_props["attention_transfer"] = json.dumps(_about(network))
    with replacing(out) as partial:
        graph.save(partial, external_data=False)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _save_authors(network: Network, run: Path, out: Path) -> None:
    """`log.txt`, a line an epoch, and `model.pt7`, as the authors' script leaves them for a WRN.

    The log also says how images are to be normalised and what the classes are called: their script has one recipe,
    this run maybe another.
    """
    if is_authors_run(run) and not RunFolder(run).exists:
        raise UserError(f"{run} is a run of the authors' script already: copy it")
    if not isinstance(network.module, WideResNet):
        raise UserError(
            f"the format authors is for wrn-DEPTH-WIDTH only, {run} holds {network.name}: choose another"
        )
    folder = RunFolder(run)
    config, rows = folder.config(), folder.metrics() or [{}]
    params = _authors_params(network.module)
    options = _authors_options(network.module, config) | {EXTRA_KEY: _about(network)}
    lines = [json.dumps(options | _authors_epoch(row)) for row in rows]
    learned = [v for k, v in params.items() if "running_" not in k]
    optimizer = torch.optim.SGD(
        learned,
        options["lr"],
        momentum=config.get("momentum", 0.9),
        weight_decay=options["weight_decay"],
    )
    model = {
        "params": params,
        "optimizer": optimizer.state_dict(),
        "epoch": rows[-1].get("epoch", 0),
    }
    with replacing(out / MODEL_FILE) as partial:
        torch.save(model, partial)
    with replacing(out / LOG_FILE) as partial:
        partial.write_text("".join(f"{LOG_PREFIX} {line}\n" for line in lines))


def _authors_params(module: nn.Module) -> dict[str, Tensor]:
    """The tensors by the authors' names, in their order: of a block, convolutions before normalisations."""
    order = ("conv0", "conv1", "bn0", "bn1", "convdim")
    state = {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}

    def place(name: str) -> tuple[str, int]:
        base, _, rest = name.partition(".block")
        number, _, layer = rest.partition(".")
        return f"{base}.{int(number):04}", order.index(layer.partition(".")[0])

    blocks = sorted((k for k in state if ".block" in k), key=place)
    names = ["conv0.weight", *blocks, *(k for k in state if k.startswith(("bn.", "fc.")))]
    convolutions = ("conv0.weight", "conv1.weight", "convdim.weight")
    return {
        k.removesuffix(".weight") if k.endswith(convolutions) else k: state[k]
        .detach()
        .cpu()
        .clone()
        for k in names
    }


def _authors_options(module: WideResNet, config: Mapping[str, Any]) -> dict[str, Any]:
    """The script's options, as far as this run has them."""
    data = str(config.get("data"))
    return {
        "depth": 6 * len(module.group0) + 4,
        "width": module.fc.in_features // 64,
        "dataset": {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}.get(data.partition(":")[0], data),
        "batch_size": config.get("batch_size"),
        "lr": config.get("lr", 0.1),
        "epochs": config.get("epochs"),
        "weight_decay": config.get("weight_decay", 5e-4),
        "epoch_step": json.dumps(list(config.get("milestones", ())), separators=(",", ":")),
        "lr_decay_ratio": config.get("lr_decay"),
        "teacher_id": Path(config["teacher"]).name if config.get("teacher") else "",
        "temperature": config.get("temperature"),
        "num_classes": module.fc.out_features,
        "n_parameters": sum(v.numel() for v in _authors_params(module).values()),
    }


def _authors_epoch(row: Mapping[str, Any]) -> dict[str, Any]:
    """An epoch's numbers by the script's names; accuracies in percent; α and β as they were in effect."""
    weights = row.get("weights", {})
    beta = weights.get("beta", 0) if "at" in row.get("parts", {}) else 0
    return {
        "alpha": weights.get("alpha", 0),
        "beta": weights.get("at.beta", beta),
        "epoch": row.get("epoch", 0),
        **{
            theirs: factor * row[ours]
            for theirs, ours, factor in (
                ("train_loss", "train_loss", 1),
                ("train_acc", "train_accuracy", 100),
                ("test_loss", "val_loss", 1),
                ("test_acc", "val_accuracy", 100),
            )
            if ours in row
        },
    }
