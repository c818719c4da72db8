"""The model card of a student for the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..models.network import Network
from ..trust import executed_file
from .hub_code import library, loading_code

PAPER = "https://arxiv.org/abs/1612.03928"
# The most important options for a reader of the card.
OPTIONS = (
    *("method", "beta", "kind", "p", "convention", "alpha", "temperature"),
    *("epochs", "batch_size", "lr", "weight_decay", "augment", "seed"),
)
MOST_CLASSES = 100
PATHS = ("folder", "parquet", "wds", "cifar10", "cifar100")


def public_name(name: str) -> str:
    """The name of a network or of data, without folders of this machine."""
    kind, _, place = name.partition(":")
    if executed_file(name) is not None:
        return Path(name).name
    if kind in PATHS and place:
        return f"{kind}:{Path(place).name}"
    return name


def model_card(
    network: Network, repo: str, config: Mapping[str, Any], summary: Mapping[str, Any]
) -> str:
    """The text of README.md: YAML that the hub reads, and Markdown for people.

    Args:
        network: the student.
        repo: OWNER/NAME.
        config: the options of the run; empty if they are not known.
        summary: summary.json of the run; empty if it is not known.
    """
    title = repo.partition("/")[2]
    parts = [
        f"---\n{_metadata(network, config)}\n---",
        f"# {title}",
        _what(network, config, summary),
        "## Use",
        "```python\n" + loading_code(network, repo) + "```",
        _input(network),
        "## Numbers",
        _numbers(network, config, summary),
        "## Training",
        _training(config),
        "## Licence",
        "To be filled in by the owner of this repository (here, and as `license:` at the top of "
        "README.md). Consider the licences of the training images and of the teacher.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(network: Network, config: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    tags = ["image-classification", "attention-transfer"]
    if config.get("teacher"):
        tags.append("knowledge-distillation")
    about: dict[str, Any] = {}
    data = str(config.get("data") or "")
    kind, _, place = data.partition(":")
    if kind in ("cifar10", "cifar100"):
        about["datasets"] = [kind]
    elif kind == "hub":
        about["datasets"] = [place]
    card = ModelCardData(
        library_name=library(network) or "pytorch",
        pipeline_tag="image-classification",
        tags=tags,
        **about,
    )
    return f"# license: to be filled in\n{card.to_yaml()}"


def _what(network: Network, config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    text = f"An image classifier: {_text(network.name)}, {len(network.classes)} classes"
    if data := summary.get("data") or config.get("data"):
        text += f", trained on {_text(data)}"
    if teacher := (summary.get("teacher") or {}).get("model"):
        text += f" with the teacher {_text(teacher)}"
    if (method := summary.get("method")) not in (None, "none"):
        text += f" (method {_text(method)})"
    return (
        f"{text}. It was trained with `attention-transfer` {__version__}; the method is that of "
        f"[Zagoruyko & Komodakis, ICLR 2017]({PAPER})."
    )


def _input(network: Network) -> str:
    height, width = network.image_size
    mean, std = (
        ", ".join(f"{value:.4g}" for value in values) for values in network.preprocess.statistics
    )
    classes = ", ".join(_text(name) for name in network.classes[:MOST_CLASSES])
    if len(network.classes) > MOST_CLASSES:
        classes += f", … ({len(network.classes)} in all)"
    return (
        f"Input: images (N, 3, {height}, {width}), RGB, in [0, 1]. The code above subtracts the "
        f"mean ({mean}) and divides by the standard deviation ({std}). Output: logits of the "
        f"classes {classes}."
    )


def _of_weights(final: Mapping[str, Any], key: str) -> float | None:
    """The metric of the uploaded float32 weights; a run in float32 has no second measurement."""
    exported: float | None = final.get(f"{key}_fp32")
    return final.get(key) if exported is None else exported


def _numbers(network: Network, config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    final, teacher = summary.get("final") or {}, summary.get("teacher") or {}
    parameters = sum(p.numel() for p in network.module.parameters())
    rows = [
        ("network", _text(network.name), _text(teacher.get("model") or "–")),
        (
            "error",
            _percent(_of_weights(final, "val_accuracy")),
            _percent(teacher.get("val_accuracy")),
        ),
        ("top-5 error", _percent(_of_weights(final, "val_top5")), "–"),
        ("parameters", _count(parameters), _count(teacher.get("parameters"))),
        ("FLOPs of one image", _count(summary.get("flops")), _count(teacher.get("flops"))),
    ]
    lines = ["| | student | teacher |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows if row[1:] != ("–", "–")]
    where = "Errors are on the validation images"
    if data := config.get("data"):
        where += f" of {_text(data)}"
    return "\n".join([*lines, "", f"{where}, of the last epoch's weights."])


def _training(config: Mapping[str, Any]) -> str:
    values = {key: config[key] for key in OPTIONS if config.get(key) is not None}
    if not values:
        return "The training options are not recorded."
    return ", ".join(f"{key} {_text(value)}" for key, value in values.items()) + "."


def _percent(accuracy: float | None) -> str:
    return "–" if accuracy is None else f"{100 * (1 - accuracy):.2f} %"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _text(value: object) -> str:
    """A value as one line of Markdown, without folders of this machine."""
    words = " ".join(public_name(str(value)).split())
    return re.sub(r"([\\`*_{}\[\]<>|#&])", r"\\\1", words)
