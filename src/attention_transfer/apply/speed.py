"""Speed and peak memory of trained networks, measured side by side for a comparison."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.network import load_trained, run_fingerprint
from ..taps import evaluating
from .inference import median_seconds
from .load import inference_model

ROUNDS = 9
BATCH = 128
ROUND_SECONDS = 0.1  # minimum for each network in each round


def measure_speeds(
    folders: Sequence[Path], device: str, trust_code: bool = False
) -> dict[Path, dict[str, Any]]:
    """Images per second, latency and peak memory of each folder that has a trained network.

    Networks that differ only in their weights are measured once. In each round all networks are
    measured one after another, so that a drift of the machine's speed affects all of them. Each
    runs in the precision of its run, which is given as `precision`.
    """
    networks: dict[Any, tuple[nn.Module, Tensor]] = {}
    keys: dict[Path, tuple[Any, ...]] = {}
    for folder in folders:
        if run_fingerprint(folder) is None:
            continue  # the run is unfinished
        network = load_trained(folder, trust_code)
        model = inference_model(network, device)
        size = network.image_size
        parameters = sum(p.numel() for p in model.module.parameters())
        keys[folder] = (network.name, parameters, size, model.precision)
        if keys[folder] not in networks:
            images = torch.rand(BATCH, 3, *size, device=model.device)
            networks[keys[folder]] = model, images.to(memory_format=torch.channels_last)
    measured = measure_in_turn(networks, ROUNDS)
    return {folder: measured[key] | {"precision": key[-1]} for folder, key in keys.items()}


def measure_in_turn(
    networks: Mapping[Any, tuple[nn.Module, Tensor]], rounds: int
) -> dict[Any, dict[str, Any]]:
    """Images per second, latency and peak memory of networks, each with its batch of images."""
    peaks = {key: _peak_mib(*pair) for key, pair in networks.items()}
    rates: dict[Any, list[float]] = {key: [] for key in networks}
    latencies: dict[Any, list[float]] = {key: [] for key in networks}
    for _ in range(rounds):
        for key, (model, images) in networks.items():
            rates[key].append(len(images) / _seconds(model, images))
            latencies[key].append(1e3 * _seconds(model, images[:1]))
    measured = {}
    for key, (_, images) in networks.items():
        measured[key] = {
            "images_per_second": _spread(rates[key]),
            "latency_ms": _spread(latencies[key]),
            "peak_mib": peaks[key],
            "device": images.device.type,
            "rounds": rounds,
        }
    return measured


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _seconds(model: nn.Module, images: Tensor) -> float:
    """Seconds per call in one round."""
    with evaluating(model):
        return median_seconds(model, images, ROUND_SECONDS)


def _peak_mib(model: nn.Module, images: Tensor) -> float | None:
    """MiB of a batch's forward pass beyond weights and images; None if it cannot be measured."""
    with evaluating(model):
        model(images)  # the first call allocates workspaces that are kept
        if images.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            model(images)
            return (torch.cuda.max_memory_allocated() - held) / 2**20
        try:
            ctypes.CDLL(None).malloc_trim(0)  # otherwise freed memory would be reused uncounted
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before = resident_mib("VmRSS")
            model(images)
            return max(0.0, resident_mib("VmHWM") - before)
        except (OSError, AttributeError):
            return None  # not Linux


def resident_mib(entry: str) -> float:
    """The present memory of this process in MiB (`VmRSS`), or its peak (`VmHWM`); only on Linux."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(entry))
    return int(line.split()[1]) / 2**10
