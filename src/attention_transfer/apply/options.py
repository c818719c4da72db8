"""The options of the commands for trained networks; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ..data.options import DATA_NAMES
from ..map_options import Exponent
from ..models.options import MODEL_NAMES, TrustCode
from ..options import Bool, Int, option
from ..outputs import Force, JsonFile
from ..runtime.options import Device, Precision

TrainedRun = Annotated[Path, option("A run folder (or the authors').", positional=True)]
ComputeDevice = Annotated[Device, option("Device to compute on.")]


@dataclass(frozen=True)
class EvaluateOptions:
    """The network to evaluate, and the images."""

    network: Annotated[
        str,
        option(
            "A run folder (or one of the authors' scripts), or a trained model and --data: "
            f"{MODEL_NAMES}.",
            positional=True,
        ),
    ]
    data: Annotated[
        str | None,
        option(f"Other data: {DATA_NAMES}.", default_text="the run's validation images"),
    ] = None
    weights: Annotated[
        str | None,
        option("State dict for a model, such as .safetensors or .pt.", default_text="none"),
    ] = None
    image_size: Annotated[
        Int | None,
        option(
            "Height and width of the images for a model.",
            ge=1,
            default_text="those of its pretrained weights, else the data's",
        ),
    ] = None
    limit_val: Annotated[
        Int | None,
        option("Number of images, balanced over the classes.", ge=1, default_text="as in the run"),
    ] = None
    device: ComputeDevice = "auto"
    precision: Annotated[
        Precision, option("Precision; auto: that of the run's training, fp32 for a model.")
    ] = "auto"
    json: JsonFile = None
    force: Force = False
    trust_code: TrustCode = False


@dataclass(frozen=True)
class PredictOptions:
    """The images to classify."""

    run: TrainedRun
    files: Annotated[tuple[Path, ...], option("Images, or folders of images.", positional=True)]
    top: Annotated[Int, option("Number of classes per image.", ge=1)] = 5
    device: ComputeDevice = "auto"
    json: JsonFile = None
    force: Force = False
    trust_code: TrustCode = False


@dataclass(frozen=True)
class ExportOptions:
    """The run to export, and the format."""

    run: TrainedRun
    format: Annotated[
        str,
        option(
            "onnx or pt2: a graph that contains the preprocessing, from images (N, 3, H, W), RGB, "
            "in [0, 1], at the run's size, to logits; safetensors or authors (a folder): the "
            "weights, with mean, standard deviation and size as metadata."
        ),
    ]
    out: Annotated[Path, option("The file or folder to write.")]
    with_attention: Annotated[
        Bool,
        option("Let the graph (onnx, pt2) also return the attention map of each stage."),
    ] = False
    int8: Annotated[
        Bool,
        option(
            "Quantise the weights and activations of --format onnx, and print the accuracy before "
            "and after."
        ),
    ] = False
    data: Annotated[
        str | None,
        option(
            f"Data to calibrate and measure --int8: {DATA_NAMES}.", default_text="the run's own"
        ),
    ] = None
    calibration_images: Annotated[
        Int | None, option("Number of training images for --int8.", ge=1, default_text="512")
    ] = None
    json: Annotated[
        Path | None,
        option("Write the numbers of --int8 to this JSON file.", default_text="none"),
    ] = None
    force: Force = False
    trust_code: TrustCode = False


@dataclass(frozen=True)
class PushOptions:
    """The run to upload to the Hugging Face hub."""

    run: TrainedRun
    repo: Annotated[str, option("Name of the repository on the hub: OWNER/NAME.", positional=True)]
    out: Annotated[
        Path | None,
        option("Folder to keep.", default_text="with --dry-run: NAME; otherwise not kept"),
    ] = None
    dry_run: Annotated[Bool, option("Write the folder and upload nothing.")] = False
    private: Annotated[Bool, option("Create a private repository.")] = False
    force: Annotated[
        Bool, option("Replace the model card of an existing repository.", default_text="keep")
    ] = False
    trust_code: TrustCode = False


@dataclass(frozen=True)
class MapsOptions:
    """The networks and images to draw."""

    networks: Annotated[
        tuple[str, ...], option(f"Run folders, or models: {MODEL_NAMES}.", positional=True)
    ]
    images: Annotated[str, option(f"An image, a folder of images, or data: {DATA_NAMES}.")]
    out: Annotated[Path, option("The figure to write: .png, .svg or .pdf.")]
    limit: Annotated[Int, option("Maximum number of images.", ge=1)] = 8
    kind: Annotated[
        Literal["sum", "max", "gradient", "attention"],
        option(
            "Reduce over channels by sum or by max; gradient: by sum, and also |∂CE/∂image| of the "
            "predicted class; attention: the class token's attention in a transformer's blocks."
        ),
    ] = "sum"
    p: Exponent = 2.0
    force: Force = False
    trust_code: TrustCode = False


@dataclass(frozen=True)
class StagesOptions:
    """The networks whose stages to list."""

    model: Annotated[str, option(f"A run folder, or a model: {MODEL_NAMES}.", positional=True)]
    teacher: Annotated[
        str | None, option("The teacher to pair it with, named in the same way.", positional=True)
    ] = None
    image_size: Annotated[
        Int | None,
        option(
            "Height and width of the example image.",
            ge=1,
            default_text="32 for wrn and nin, a run's own, else 224",
        ),
    ] = None
    json: JsonFile = None
    force: Force = False
    trust_code: TrustCode = False


@dataclass(frozen=True)
class CompareOptions:
    """The runs to compare, and the files to write."""

    runs: Annotated[
        tuple[Path, ...],
        option("Run folders (also of the authors' scripts), or folders of them.", positional=True),
    ]
    out: Annotated[
        Path | None, option("The report to write (one HTML file).", default_text="none")
    ] = None
    title: Annotated[str | None, option("Headline of the report.", default_text="automatic")] = None
    speed: Annotated[
        Bool,
        option("Measure the speed and memory of each distinct network, in turn, on this machine."),
    ] = False
    device: ComputeDevice = "auto"
    json: JsonFile = None
    force: Force = False
    trust_code: TrustCode = False
