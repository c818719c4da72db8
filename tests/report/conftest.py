"""Made-up run folders: a teacher, a student alone and three methods, two seeds each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attention_transfer.report import LoadedRun, read_run
from attention_transfer.run_folder import RunFolder, write_json

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
STAGES = ["group1", "group2", "group3"]
ERRORS = {
    "teacher": (22.0, 22.6),
    "none": (34.0, 35.2),
    "at": (31.0, 32.0),
    "kd": (29.1, 30.3),
    "at+kd": (25.2, 26.2),
}
COST = {
    "wrn-16-2": {
        "model": "wrn-16-2", "parameters": 691_674, "flops": 202_000_000,
        "inference": {"images_per_second": 1_900.0, "batch_size": 128, "latency_ms": 3.1},
    },
    "wrn-16-1": {
        "model": "wrn-16-1", "parameters": 175_066, "flops": 52_000_000,
        "inference": {"images_per_second": 4_800.0, "batch_size": 128, "latency_ms": 1.7},
    },
}  # fmt: skip
EPOCHS = 12


def metrics(error: float, method: str, seed: int, epochs: int = EPOCHS) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl that fall towards `error` percent."""
    noise = np.random.default_rng(seed)
    rows = []
    for epoch in range(1, epochs + 1):
        rest = float(np.exp(-4.2 * epoch / EPOCHS))
        now = error + (88 - error) * rest
        if epoch < EPOCHS:
            now += float(noise.normal(0, 1.2))
        loss = 0.03 * now
        parts, weights = {"ce": loss}, {}
        if "at" in method:
            parts["at"], weights["beta"] = 0.2 * loss, 1000.0 * (1 - epoch / EPOCHS)
        if "kd" in method:
            parts["kd"], weights["alpha"] = 0.2 * loss, 0.9
        rows.append({
            "epoch": epoch, "step": 40 * epoch, "lr": 0.1,
            "train_loss": 0.85 * loss, "val_loss": loss,
            "train_accuracy": 1 - 0.009 * now, "val_accuracy": 1 - now / 100,
            "parts": parts, "weights": weights, "images_per_second": 900.0, "seconds": 4.0,
        })  # fmt: skip
    return rows


def photos(count: int = 12, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Images (K, H, W, 3) of a blob on a ground, and the blobs' boxes (K, 4)."""
    noise = np.random.default_rng(7)
    y, x = np.mgrid[:size, :size]
    images, boxes = [], []
    for _ in range(count):
        cx, cy, r = noise.uniform(10, 22), noise.uniform(10, 22), noise.uniform(5, 9)
        inside = (((x - cx) / r) ** 2 + ((y - cy) / (0.8 * r)) ** 2 < 1)[..., None]
        ground = noise.uniform(60, 200, 3) + 40 * np.sin(x / 5 + noise.uniform(0, 6))[..., None]
        images.append(
            np.where(inside, noise.uniform(0, 255, 3), ground) + noise.normal(0, 9, (size, size, 3))
        )
        boxes.append([int(cx - r), int(cy - 0.8 * r), int(cx + r) + 1, int(cy + 0.8 * r) + 1])
    return np.clip(images, 0, 255).astype(np.uint8), np.array(boxes)


def write_maps(folder: RunFolder, error: float, seed: int, classes: list[str]) -> None:
    images, boxes = photos()
    count = len(images)
    noise = np.random.default_rng(int(error * 10) + seed)
    labels = np.arange(count) % len(classes)
    wrong = noise.uniform(0, 100, count) < 1.3 * error
    arrays = {}
    for s, size in enumerate((32, 16, 8)):
        y, x = (np.mgrid[:size, :size] + 0.5) * 32 / size
        centres = boxes[:, :2] / 2 + boxes[:, 2:] / 2
        blur = noise.uniform(3, 4 + error / 6, count)
        heat = [
            np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * b * b))
            for (cx, cy), b in zip(centres, blur, strict=True)
        ]
        heat = np.array(heat) + noise.uniform(0, 0.5 - 0.1 * s, (count, size, size))
        arrays[f"map.{s}"] = (heat / np.linalg.norm(heat, axis=(1, 2), keepdims=True)).astype(
            np.float32
        )
    np.savez(
        folder.maps_file, images=images, labels=labels, boxes=boxes,
        predictions=np.where(wrong, (labels + 3) % len(classes), labels),
        stages=np.array(STAGES), classes=np.array(classes), **arrays,
    )  # fmt: skip


def write_predictions(folder: RunFolder, error: float, seed: int, classes: list[str]) -> None:
    noise = np.random.default_rng(int(error * 10) + seed)
    labels = np.arange(200) % len(classes)
    answers = {"labels": labels}
    for name, percent in (("student", error), ("teacher", 22.0)):
        wrong = noise.uniform(0, 100, len(labels)) < percent
        answers[name] = np.where(wrong, (labels + 1) % len(classes), labels)
    np.savez(folder.predictions_file, classes=np.array(classes), **answers)


def fabricate(
    root: Path,
    name: str,
    kind: str,
    seed: int,
    error: float,
    /,
    finished: bool = True,
    classes: list[str] = CLASSES,
    **config: Any,
) -> RunFolder:
    """Writes one run folder `root/name/seed-N` as the engine would."""
    folder = RunFolder(root / name / f"seed-{seed}")
    teacher = kind == "teacher"
    model = "wrn-16-2" if teacher else "wrn-16-1"
    source = None if kind in ("teacher", "none") else str(root / "teacher" / "seed-0")
    command = "train" if teacher else "distill"
    folder.write_config({
        "command": command, "model": model, "teacher": source, "method": None if teacher else kind,
        "data": "cifar10:/somewhere/cifar10", "epochs": EPOCHS, "batch_size": 128, "lr": 0.1,
        "seed": seed, "beta": 1000.0 if "at" in kind else None,
        "device": "auto",
    } | config)  # fmt: skip
    folder.write_metrics(metrics(error, kind, seed, EPOCHS if finished else 5))
    write_json(folder.environment_file, {
        "versions": {"attention-transfer": "0.1.0", "python": "3.11.9", "torch": "2.9.0"},
        "hardware": {"cpu": "Example CPU @ 2.5 GHz", "cores": 2, "gpu": None},
        "commit": "0123abc", "command": ["attention-transfer", "distill", "--seed", str(seed)],
        "auto": {"device": "cpu", "precision": "fp32", "compile": False, "threads": 2},
    })  # fmt: skip
    if not finished:
        return folder
    write_maps(folder, error, seed, classes)
    write_predictions(folder, error, seed, classes)
    facts = None
    if source is not None:
        facts = {"name": "teacher", "folder": source, "val_accuracy": 0.78, **COST["wrn-16-2"]}
    final = {"train_loss": 0.5, "val_loss": 0.7, "val_accuracy": 1 - error / 100}
    write_json(folder.summary_file, {
        "command": command, "method": kind, "data": "cifar10", "seed": seed, "epochs": EPOCHS,
        "classes": classes, "seconds": 60.0 + 12 * seed, "images_per_second": 900.0,
        "final": final, "teacher": facts, **COST[model],
        "attention": {"stages": STAGES, "in_box": [0.22, 0.3, 0.7 - error / 100], "box_area": 0.21},
    })  # fmt: skip
    return folder


def make_all(root: Path, **config: Any) -> list[LoadedRun]:
    """Five settings, two seeds each, in an order that the report must mend."""
    order = ["at", "kd", "at+kd", "none", "teacher"]
    folders = [
        fabricate(root, m.replace("none", "alone"), m, s, ERRORS[m][s], **config)
        for m in order
        for s in (0, 1)
    ]
    return [read_run(folder) for folder in folders]


@pytest.fixture(scope="session")
def make_run() -> Callable[..., RunFolder]:
    """Writes one run folder: make_run(root, name, method, seed, error, finished=True, **config)."""
    return fabricate


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[LoadedRun]:
    return make_all(tmp_path_factory.mktemp("runs"))
