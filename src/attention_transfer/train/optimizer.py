"""The optimiser: learning rates by layer, weight decay, schedules, warm-up and clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
)

from ..errors import UserError
from ..models.weights import head_parameters
from ..taps import evaluating, stages
from ..transfer import Transfer
from .options import OptimizerOptions


def peak_lr(options: OptimizerOptions, batch_size: int) -> float:
    """The highest learning rate: `lr`, scaled by batch / reference batch (Goyal et al., 2017)."""
    if options.lr_reference_batch is None:
        return options.lr
    return options.lr * (batch_size / options.lr_reference_batch)


def make_optimizer(
    options: OptimizerOptions,
    transfer: Transfer,
    example: Tensor | None = None,
    lr: float | None = None,
) -> Optimizer:
    """SGD or AdamW over the trainable parameters, fused where the device supports it.

    Args:
        example: a batch after the student's preprocessing; `layer_decay` needs it for the stages.
        lr: the peak rate; without it `options.lr`.

    Raises:
        UserError: if an option needs the student's head or stages and none are found.
    """
    lr = options.lr if lr is None else lr
    groups = _parameter_groups(options, transfer, example, lr)
    fused = next(transfer.trainable_parameters()).device.type in ("cpu", "cuda")
    common: dict[str, Any] = {"lr": lr, "weight_decay": options.weight_decay, "fused": fused}
    if options.optimizer == "adamw":
        return AdamW(groups, betas=(options.momentum, 0.999), **common)
    return SGD(groups, momentum=options.momentum, nesterov=options.nesterov, **common)


def _parameter_groups(
    options: OptimizerOptions, transfer: Transfer, example: Tensor | None, lr: float
) -> list[Any]:
    """The list of parameters, or groups of equal rate and decay.

    `lr_scale` is a group's rate divided by `lr`. timm's `param_groups_layer_decay` is not used: its
    groups have another order, on which checkpoints depend, and it supports neither `head_lr` nor
    networks that are not timm's.
    """
    if options.head_lr is None and options.layer_decay is None and options.weight_decay_on_norm:
        return list(transfer.trainable_parameters())
    scales = _lr_scales(options, transfer.student, example)
    no_decay: set[str] = set()
    if not options.weight_decay_on_norm:
        # timm's models list parameters without decay, such as position embeddings.
        names: set[str] = getattr(transfer.student, "no_weight_decay", set)()
        no_decay = {f"student.{name}" for name in names}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in transfer.named_parameters():
        if not parameter.requires_grad:
            continue
        weight_decay = options.weight_decay
        if not options.weight_decay_on_norm and (parameter.ndim <= 1 or name in no_decay):
            weight_decay = 0.0
        key = (scales.get(name, 1.0), weight_decay)  # adapters of the methods have a scale of 1
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": lr * scale, "weight_decay": decay, "lr_scale": scale}
        for (scale, decay), parameters in groups.items()
    ]


def _lr_scales(
    options: OptimizerOptions, student: nn.Module, example: Tensor | None
) -> dict[str, float]:
    """The factor on the rate of each parameter, by its name in the transfer; absent: 1."""
    if options.head_lr is None and options.layer_decay is None:
        return {}
    classes = None
    if example is not None:
        with evaluating(student):
            classes = int(student(example).shape[1])
    head = head_parameters(student, classes)
    scales: dict[str, float] = {}
    if options.layer_decay is not None:
        layers = layer_numbers(student, head, example)
        last = max(layers.values())
        scales = {name: options.layer_decay ** (last - layer) for name, layer in layers.items()}
    if options.head_lr is not None:
        scales |= dict.fromkeys(head, options.head_lr / options.lr)
    return {f"student.{name}": scale for name, scale in scales.items()}


def layer_numbers(student: nn.Module, head: list[str], example: Tensor | None) -> dict[str, int]:
    """{parameter: layer}, from input to output; the head is the last layer.

    timm's models have their own layer numbers; other networks are numbered by stages.

    Raises:
        UserError: for a network that is not timm's, if there is no example or it has no stages.
    """
    if callable(matcher := getattr(student, "group_matcher", None)):
        from timm.models import group_parameters

        return dict(group_parameters(student, matcher(coarse=False), reverse=True))
    if example is None:
        raise UserError(
            "layer_decay needs example=, a preprocessed batch, to find the student's stages"
        )
    order = {name: i for i, (name, _) in enumerate(student.named_modules())}
    ends = []  # for each stage, the position of the last module in it
    for stage in stages(student, example):
        prefix = f"{stage.name}."
        ends.append(max(i for n, i in order.items() if n == stage.name or n.startswith(prefix)))
    layers = {}
    for name, _ in student.named_parameters():
        position = order[name.rpartition(".")[0]]
        stages_before = sum(end < position for end in ends)
        # Parameters between the last stage and the head belong to the last stage.
        layers[name] = min(stages_before, len(ends) - 1)
        if name in head:
            layers[name] = len(ends)
    used = sorted(set(layers.values()))
    return {name: used.index(layer) for name, layer in layers.items()}


def make_scheduler(
    options: OptimizerOptions, optimizer: Optimizer, steps_per_epoch: int, total_steps: int
) -> LRScheduler:
    """The learning rate of each step; `step` drops it at the start of each milestone epoch."""
    if options.schedule == "one-cycle":
        return OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            # With fewer than 5 steps the warm-up has length 0, and PyTorch divides by it.
            total_steps=max(total_steps, 5),
            # From lr / 10 up to lr in a quarter of the steps, then down to lr / 1e5, linearly.
            pct_start=0.25,
            anneal_strategy="linear",
            # By default torch cycles the momentum, which would override --momentum.
            cycle_momentum=False,
            div_factor=10,
            final_div_factor=1e4,
        )
    if options.schedule == "cosine":
        return CosineAnnealingLR(optimizer, total_steps)
    if options.schedule == "step":
        milestones = [(epoch - 1) * steps_per_epoch for epoch in options.milestones]
        return MultiStepLR(optimizer, milestones, options.lr_decay)
    return ConstantLR(optimizer, factor=1.0, total_iters=0)


class Update:
    """Applies the gradients: clips them, and scales the scheduled rates during the warm-up.

    The warm-up is not a torch scheduler: chained schedulers would change the checkpoint's format,
    and torch's cosine schedule computes each rate from the previous one.
    """

    def __init__(
        self,
        options: OptimizerOptions,
        optimizer: Optimizer,
        parameters: Iterable[nn.Parameter],
        steps_per_epoch: int,
    ):
        self.optimizer, self.clip_norm = optimizer, options.clip_norm
        self.parameters = list(parameters)
        self.warm_up_steps = round(options.warmup_epochs * steps_per_epoch)

    def lr(self, step: int) -> float:
        """The run's rate at `step`; the rate of a group is `lr_scale` times this rate."""
        group = self.optimizer.param_groups[0]
        return float(group["lr"] / group.get("lr_scale", 1.0) * self._warm_up(step))

    def __call__(self, apply: Callable[[], Any], step: int) -> None:
        """Calls `apply`, the optimiser's step as Fabric has wrapped it."""
        if self.clip_norm is not None:
            # A non-finite norm makes the weights non-finite; this is checked before each save.
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        groups = self.optimizer.param_groups
        scheduled = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] *= self._warm_up(step)
        apply()
        for group, lr in zip(groups, scheduled, strict=True):
            group["lr"] = lr

    def _warm_up(self, step: int) -> float:
        """The factor at `step`, counted from 0: 1/n, 2/n, … 1 over the first n steps, then 1."""
        return min(1.0, (step + 1) / max(self.warm_up_steps, 1))


def describe_rates(options: OptimizerOptions, batch_size: int, optimizer: Optimizer) -> list[str]:
    """Lines about the learning rates; none if all weights have the rate `lr`."""
    lines = []
    peak = peak_lr(options, batch_size)
    if options.lr_reference_batch is not None:
        lines.append(
            f"learning rate {peak:g} = {options.lr:g} × batch {batch_size} / "
            f"{options.lr_reference_batch}"
        )
    if options.head_lr is not None or options.layer_decay is not None:
        counts: dict[float, int] = {}
        for group in optimizer.param_groups:
            rate = group["lr_scale"] * peak
            counts[rate] = counts.get(rate, 0) + sum(p.numel() for p in group["params"])
        rates = [f"{rate:.3g} ({count:,} weights)" for rate, count in sorted(counts.items())]
        lines.append("learning rates by layer: " + ", ".join(rates))
    return lines
