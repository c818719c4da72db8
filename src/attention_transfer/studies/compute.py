"""FLOPs of a training step, including second derivatives, and the memory of its activations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from warnings import catch_warnings

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..config import Recipe
from ..methods.registry import create_methods, needs_teacher
from ..models.create import create_model
from ..models.network import load_run_network
from ..second_order import BatchStatisticsWarning
from ..transfer import Transfer
from .plan import is_trained

IMAGES, SIZE = 4, 32
CLASSES = 10


def step_flops(recipe: Recipe, teacher: str, method: str) -> float:
    """FLOPs per image of a step's forward and backward pass, including the teacher's forward.

    `teacher` is a model's name or a run folder.
    """
    # Weights and schedules add no FLOPs, and the recipe's may not fit `method`.
    methods = create_methods(replace(recipe, method=method, beta=None, decay=None))
    torch.manual_seed(0)
    teacher_module, classes = None, CLASSES
    if needs_teacher(method):
        if is_trained(teacher):
            trained = load_run_network(teacher, recipe.trust_code)
            teacher_module, classes = trained.module, len(trained.classes)
        else:
            teacher_module = create_model(teacher, classes).eval()
    student = create_model(recipe.model, classes)
    x = torch.rand(IMAGES, 3, SIZE, SIZE)
    transfer = Transfer(student, teacher_module, methods, example=x)
    # Each run prints the warning.
    quiet = catch_warnings(action="ignore", category=BatchStatisticsWarning)
    with _FlopCounter() as counter, quiet:
        transfer(x, torch.arange(IMAGES) % classes, torch.tensor(0.0)).loss.backward()
    return counter.total / IMAGES


class _FlopCounter(TorchDispatchMode):
    """Like torch's FlopCounterMode, whose module hooks fail under torch.autograd.grad."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        count = flop_registry.get(function.overloadpacket)
        if count is not None:
            self.total += count(*args, **kwargs, out_val=result)
        return result


def saved_mib(network: nn.Module, images: Tensor) -> float:
    """MiB of activations that a forward pass keeps for the backward pass, without weights.

    Each storage counts once. The result is the same on every device.
    """
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    training = network.training
    network.train()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = network(images)
        F.cross_entropy(logits, logits.argmax(1))
    network.train(training)
    return sum(storages.values()) / 2**20
