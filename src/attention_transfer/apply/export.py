"""Exports a run's network: safetensors, a PyTorch or ONNX graph, or the authors' files.

`pt2` and `onnx` contain preprocessing and network as one graph (`graph.py`). `safetensors` and
`authors` contain the weights only; the preprocessing is in their metadata. Weights are float32 for
every precision of the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError, check_choice, plural
from ..models.network import load_trained, save_student
from ..outputs import check_new_folder, check_output
from .authors_files import save_authors
from .graph import OPSET, attention_layers, save_onnx, save_pt2
from .options import ExportOptions

FORMATS = ("safetensors", "onnx", "pt2", "authors")
GRAPHS = ("onnx", "pt2")
CALIBRATION_IMAGES = 512


def export(options: ExportOptions) -> tuple[str, dict[str, Any]]:
    """Writes the file or folder that the options describe.

    Returns:
        The format with a note on the file, and the numbers of an int8 network.

    Raises:
        UserError: as `export_run` and `export_int8`; for options that do not go together.
    """
    o = options
    if o.int8:
        if o.format != "onnx":
            raise UserError(f"--int8 is for --format onnx: got --format {o.format}")
        from .quantize import export_int8

        images = o.calibration_images or CALIBRATION_IMAGES
        switches = o.force, o.trust_code, o.with_attention
        numbers = export_int8(o.run, o.out, o.data, images, *switches)
        calibrated = plural(numbers["calibration_images"], "training image")
        return f"onnx (int8, opset {OPSET}, calibrated on {calibrated})", numbers
    for flag, value in (
        ("--data", o.data),
        ("--calibration-images", o.calibration_images),
        ("--json", o.json),
    ):
        if value is not None:
            raise UserError(f"{flag} is for --int8: add --int8, or leave {flag} out")
    note = export_run(o.run, o.format, o.out, o.force, o.trust_code, o.with_attention)
    if note:
        return f"{o.format} ({note})", {}
    return o.format, {}


def export_run(
    run: Path,
    form: str,
    out: Path,
    force: bool = False,
    trust_code: bool = False,
    with_attention: bool = False,
) -> str:
    """Writes the network of a run, ours or the authors', to `out`: a file, or for authors a folder.

    Args:
        force: replace a file of a run, or one of another format.
        trust_code: the run may name a network FILE.py:FACTORY.
        with_attention: a graph also returns the attention maps of the stages.

    Returns:
        A note on the file, or "".

    Raises:
        UserError: for an unknown format, a folder without a finished run, an `out` that exists, a
            network that the format does not support, and a missing extra.
    """
    check_choice("format", form, FORMATS)
    if with_attention and form not in GRAPHS:
        raise UserError(
            f"--with-attention needs a graph, and {form} has weights only: "
            "choose --format onnx or pt2"
        )
    if form == "authors":
        check_new_folder("--out", out, "for the format authors ")
    else:
        check_output("--out", out, form, force)
    network = load_trained(run, trust_code)
    about = network.metadata()
    layers = []
    if with_attention:
        layers = attention_layers(network)
    if form == "authors":
        save_authors(network, about, run, out)
    elif form == "onnx":
        difference = save_onnx(network, about, out, layers)
        return f"opset {OPSET}, onnxruntime differs from PyTorch by {difference:.1e} at most"
    elif form == "pt2":
        save_pt2(network, about, out, layers)
    else:
        save_student(out, network.module, about)
    return ""
