"""Exports a network with its preprocessing as one graph, by `torch.export` or to ONNX.

Images (N, 3, H, W), RGB, in [0, 1] at the network's size, any N -> logits (N, classes). With
attention, the graph also returns the attention map of each stage, (N, h, w).
"""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RunError, UserError, first_line
from ..models.network import METADATA_KEY, Network
from ..quiet import quiet
from ..run_folder import replacing
from ..taps import stages, tap
from .maps import map_on_grid

METADATA_FILE = "attention_transfer.json"  # inside a pt2 file
OPSET = 18  # of ONNX; runtimes know it since 2023
MAP_PREFIX = "attention."  # of the ONNX outputs that are maps, before the name of the stage
TOLERANCE = 1e-4  # of ONNX's outputs, relative to the largest one or to 1
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class _Graph(nn.Module):
    """Images in [0, 1] -> logits, or (logits, {stage: attention map}) if layers are given."""

    def __init__(self, network: Network, layers: list[str]):
        super().__init__()
        self.preprocess, self.module = network.preprocess, network.module
        self._tap = tap(network.module, layers)

    def forward(self, x: Tensor) -> Any:
        logits, features = self._tap(self.preprocess(x))
        if not features:
            return logits
        return logits, {layer: map_on_grid(f) for layer, f in features.items()}


def attention_layers(network: Network) -> list[str]:
    """The stages of a network whose maps a graph can return.

    Raises:
        UserError: for a network without feature maps.
    """
    return [stage.name for stage in stages(network.module, torch.zeros(1, 3, *network.image_size))]


def describe_graph(about: dict[str, Any], layers: list[str]) -> dict[str, Any]:
    """The metadata of a network, with descriptions of the inputs and outputs of its graph."""
    height, width = about["image_size"]
    about = about | {
        "input": (
            f"images (N, 3, {height}, {width}), RGB, in [0, 1]; "
            "normalisation by mean and std is inside"
        ),
        "output": f"logits (N, {len(about['classes'])})",
    }
    if layers:
        formula = "(N, h, w): the sum of |A|² over the channels, divided by its L2 norm"
        about["attention"] = {"stages": layers, "maps": formula}
    return about


def export_graph(network: Network, layers: list[str]) -> torch.export.ExportedProgram:
    """Preprocessing and network as one graph with a free batch size.

    Raises:
        UserError: for a network that cannot be traced.
    """
    module = _Graph(network, layers).eval().requires_grad_(False)
    # With a batch of 1, the batch size would become a constant.
    example = torch.rand(2, 3, *network.image_size)
    shapes = ({0: torch.export.Dim("batch")},)
    try:
        return torch.export.export(module, (example,), dynamic_shapes=shapes)
    except Exception as error:  # tracing raises many kinds of exceptions
        raise UserError(_failure(network, "as a graph", error)) from error


def _failure(network: Network, kind: str, error: Exception) -> str:
    return f"{network.name} cannot be exported {kind}: {type(error).__name__}: {first_line(error)}"


def save_pt2(network: Network, about: dict[str, Any], out: Path, layers: list[str]) -> None:
    """Writes a graph that `torch.export.load(out).module()` runs."""
    extra_files = {METADATA_FILE: json.dumps(describe_graph(about, layers))}
    # A stream, because torch.export.save warns about file names that do not end in .pt2.
    stream = io.BytesIO()
    torch.export.save(export_graph(network, layers), stream, extra_files=extra_files)
    with replacing(out) as partial:
        partial.write_bytes(stream.getvalue())


def check_onnx_packages(what: str) -> None:
    """Raises `UserError` if a package of the extra onnx is missing; `what` needs it."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{what} needs {' and '.join(missing)}: pip install 'attention-transfer[onnx]'"
        )


def save_onnx(network: Network, about: dict[str, Any], out: Path, layers: list[str]) -> float:
    """Writes an ONNX model of standard operators.

    Returns:
        The largest difference of its outputs in onnxruntime from PyTorch's, for batches of 1 and 3.

    Raises:
        UserError: for a missing package, and a network that cannot be exported.
        RunError: if the difference exceeds 1e-4, relative to the largest output or to 1.
    """
    check_onnx_packages("--format onnx")
    graph = export_graph(network, layers)
    outputs = ["logits", *(MAP_PREFIX + layer for layer in layers)]
    names: dict[str, Any] = {"input_names": ["images"], "output_names": outputs}
    names["dynamic_shapes"] = ({0: "batch"},)  # otherwise the free axis is called s31
    try:
        with quiet():
            program = torch.onnx.export(
                graph, dynamo=True, verbose=False, opset_version=OPSET, **names
            )
    except Exception as error:
        raise UserError(_failure(network, "to ONNX", error)) from error
    assert program is not None
    about = describe_graph(about, layers) | {"opset": OPSET}
    program.model.metadata_props[METADATA_KEY] = json.dumps(about)
    program.model.graph.inputs[0].doc_string = about["input"]
    with replacing(out) as partial:
        program.save(partial, external_data=False)
        return _check_outputs(network.name, partial, graph)


def _check_outputs(name: str, file: Path, graph: torch.export.ExportedProgram) -> float:
    """The largest difference between onnxruntime and PyTorch; `RunError` if it is too large."""
    session, module = open_session(file), graph.module()
    shape = session.get_inputs()[0].shape[1:]
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    # Other batch sizes than that of the example, to check that the batch size is free.
    for count in (1, 3):
        images = torch.rand(count, *shape, generator=generator)
        with torch.no_grad():
            expected, _ = torch.utils._pytree.tree_flatten(module(images))
        for theirs, ours in zip(
            session.run(None, {"images": images.numpy()}), expected, strict=True
        ):
            difference = float((torch.from_numpy(theirs) - ours).abs().max())
            # `not <=` instead of `>`, so that NaN is refused as well.
            if not difference <= TOLERANCE * max(1.0, float(ours.abs().max())):
                raise RunError(
                    f"{name} gives other outputs in onnxruntime than in PyTorch: they differ by "
                    f"{difference:.2g}; nothing was written"
                )
            largest = max(largest, difference)
    return largest


def open_session(file: Path) -> Any:
    """An onnxruntime session on the CPU with PyTorch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    return onnxruntime.InferenceSession(
        file.read_bytes(), options, providers=["CPUExecutionProvider"]
    )
