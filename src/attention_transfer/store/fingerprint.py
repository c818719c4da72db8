"""What identifies the teacher of a store: its weights and its preprocessing."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from ..models.network import Network
from ..run_folder import run_path
from ..trust import executed_file
from .header import TeacherRecord


def teacher_record(network: Network) -> TeacherRecord:
    fingerprint = network_fingerprint(network.module, network.preprocess)
    if (code := executed_file(network.name)) is not None:
        # With other code it is another network.
        fingerprint = hashlib.sha256(fingerprint.encode() + code.read_bytes()).hexdigest()
    return TeacherRecord(
        network.name,
        fingerprint,
        network.classes,
        network.has_class_names,
        str(run_path(network.folder).resolve()) if network.folder else None,
        network.fingerprint,
    )


def network_fingerprint(network: nn.Module, preprocess: object = None) -> str:
    """SHA-256 of the class, parameters and buffers of a network, and of its preprocessing.

    A preprocessing function that is not a module is identified by its name alone.
    """
    digest = hashlib.sha256(type(network).__name__.encode())
    if preprocess is not None and not isinstance(preprocess, nn.Module):
        digest.update(str(getattr(preprocess, "__qualname__", type(preprocess))).encode())
    for module in (network, preprocess):
        if isinstance(module, nn.Module):
            _add(digest, module)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, module: nn.Module) -> None:
    # The image size of a preprocessing is an attribute, not a buffer.
    digest.update(repr(getattr(module, "size", None)).encode())
    # The state dict would leave out buffers that are not persistent.
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, tensor in sorted(tensors.items()):
        if name.endswith("num_batches_tracked"):  # no output depends on it
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().tobytes())
