"""environment.json: versions, hardware and command of a run, so that it can be repeated."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .resolve import RuntimeConfig

PACKAGES = ("attention-transfer", "torch", "torchvision", "timm", "lightning", "numpy", "pyarrow")


def environment(runtime: RuntimeConfig) -> dict[str, Any]:
    """Versions, hardware, commit and command of this process, and its runtime."""
    gpu = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    return {
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        "hardware": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "gpu": gpu,
            "system": f"{platform.system()} {platform.machine()}",
        },
        "commit": _commit(),
        "command": [_program(), *sys.argv[1:]],
        "auto": asdict(runtime),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of this package's checkout, with a + where files differ; None if installed."""
    git = ["git", "-C", str(Path(__file__).parent)]

    def output(*args: str) -> str:
        result = subprocess.run([*git, *args], capture_output=True, text=True, timeout=10)
        result.check_returncode()
        return result.stdout.strip()

    try:
        # An installed package may be inside the checkout of another project.
        output("ls-files", "--error-unmatch", __file__)
        return output("describe", "--always", "--abbrev=12", "--dirty=+")
    except (OSError, subprocess.SubprocessError):
        return None


def _program() -> str:
    name = Path(sys.argv[0]).name
    # Started by `python -m attention_transfer`.
    return "attention-transfer" if name == "__main__.py" else name
