"""Exports a run's network as an ONNX model with int8 weights and activations, by onnxruntime.

The quantisation is static: convolutions and linear layers get a scale for each output channel of
their weights, and one for their inputs, which is measured on training images.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..data.dataset import Images
from ..data.open import open_data
from ..data.stream import default_workers
from ..errors import UserError, first_line
from ..outputs import check_output
from ..quiet import quiet
from ..run_folder import replacing
from .evaluate import EVALUATION_BATCH, evaluate, run_and_data
from .graph import METADATA_KEY, attention_layers, check_onnx_packages, open_session, save_onnx
from .inference import as_input

QUANTIZED = ("Conv", "Gemm", "MatMul")  # other operators stay in float32
CALIBRATION_BATCH = 32


def export_int8(
    run: Path,
    out: Path,
    data: str | None,
    calibration_images: int,
    force: bool = False,
    trust_code: bool = False,
    with_attention: bool = False,
) -> dict[str, Any]:
    """Writes the int8 model, and measures it and the float32 one on the validation images.

    Args:
        data: the data to use instead of the run's own.
        calibration_images: the number of training images, balanced over the classes.

    Returns:
        `fp32` and `int8`, each with `accuracy`, `loss` and `bytes` of its file; `images` and
        `calibration_images` are the numbers of images.

    Raises:
        UserError: as `export_run`; for data with other classes; for a network that onnxruntime
            cannot quantise.
    """
    check_output("--out", out, "onnx", force)
    check_onnx_packages("--int8")
    network, options = run_and_data(str(run), data, None, None, trust_code)
    options |= {"limit_train": calibration_images, "workers": default_workers(on_cpu=True)}
    dataset = open_data(**options)
    network.check_classes(dataset.classes, str(run))
    layers = []
    if with_attention:
        layers = attention_layers(network)
    about = network.metadata()
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "fp32.onnx"
        save_onnx(network, about, exact, layers)
        numbers = {"fp32": _measure(exact, dataset.val)}
        with replacing(out) as partial:
            try:
                _quantize(exact, partial, dataset.train)
            except Exception as error:  # onnxruntime raises many kinds of exceptions
                text = f"{type(error).__name__}: {first_line(error)}"
                raise UserError(
                    f"onnxruntime cannot quantise {network.name} ({text}): leave --int8 out"
                ) from error
            numbers["int8"] = _measure(partial, dataset.val)
    counts = {"images": len(dataset.val), "calibration_images": len(dataset.train)}
    return {"run": str(run), "data": dataset.spec, **counts, **numbers}


def _quantize(exact: Path, out: Path, images: Images) -> None:
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = exact.with_name("prepared.onnx")
    with quiet():
        # Fuses batch normalisation into convolutions before they are quantised.
        quant_pre_process(exact, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            out,
            SimpleNamespace(get_next=partial(next, _batches(images), None)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    model, original = onnx.load(out), onnx.load(exact)
    about = {prop.key: prop.value for prop in original.metadata_props}
    described = json.loads(about[METADATA_KEY]) | {"precision": "int8"}
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(described)})
    model.graph.input[0].doc_string = original.graph.input[0].doc_string
    used = {node.domain for node in model.graph.node}
    # onnxruntime adds every operator set that it knows.
    for other in [entry for entry in model.opset_import if entry.domain not in used]:
        model.opset_import.remove(other)
    onnx.save(model, out)


def _batches(images: Images) -> Iterator[dict[str, Any]]:
    for start in range(0, len(images), CALIBRATION_BATCH):
        batch = images.batch(slice(start, start + CALIBRATION_BATCH))
        yield {"images": as_input(batch).contiguous().numpy()}


def _measure(file: Path, images: Images) -> dict[str, float]:
    """Accuracy and loss of an ONNX model on images, and the size of its file."""
    session = open_session(file)

    def forward(x: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": x.contiguous().numpy()})
        return torch.from_numpy(logits)

    metrics = evaluate(forward, images, EVALUATION_BATCH, "cpu")
    return {**metrics, "bytes": file.stat().st_size}
