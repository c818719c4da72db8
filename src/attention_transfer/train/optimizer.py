"""The optimiser of a run: rates by layer, what is decayed, schedules, warm-up, mixed images, averaged weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
)

from ..config import Recipe
from ..errors import UserError
from ..models import head_parameters
from ..taps import evaluating, stages
from ..transfer import Transfer

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def peak_lr(recipe: Recipe) -> float:
    """The highest learning rate: `lr`, times batch over reference batch where one is given (Goyal et al., 2017)."""
    return recipe.lr * _batch_factor(recipe)


def _batch_factor(recipe: Recipe) -> float:
    return (
        1.0 if recipe.lr_reference_batch is None else recipe.batch_size / recipe.lr_reference_batch
    )


def make_optimizer(recipe: Recipe, transfer: Transfer, example: Tensor | None = None) -> Optimizer:
    """SGD or AdamW over what the transfer trains, in its fused form where the device has one.

    Args:
        example: a batch as the student sees it, by which `layer_decay` finds its stages.

    Raises:
        UserError: where a head or layers are asked for that the student does not show.
    """
    found: list[Any] = parameter_groups(recipe, transfer, example)
    lr, decay = peak_lr(recipe), recipe.weight_decay
    fused = next(transfer.trainable_parameters()).device.type in ("cpu", "cuda")
    if recipe.optimizer == "adamw":
        return AdamW(found, lr, betas=(recipe.momentum, 0.999), weight_decay=decay, fused=fused)
    return SGD(
        found, lr, recipe.momentum, weight_decay=decay, nesterov=recipe.nesterov, fused=fused
    )


def parameter_groups(
    recipe: Recipe, transfer: Transfer, example: Tensor | None = None
) -> list[Any]:
    """What the optimiser gets: the plain list of parameters, or groups of one rate and one decay each.

    A group's `lr_scale` is its rate over the run's.
    """
    if recipe.head_lr is None and recipe.layer_decay is None and recipe.weight_decay_on_norm:
        return list(transfer.trainable_parameters())
    scales = _scales(recipe, transfer.student, example)
    spared: set[str] = set()
    if not recipe.weight_decay_on_norm:
        spared = {f"student.{name}" for name in getattr(transfer.student, "no_weight_decay", set)()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in transfer.named_parameters():
        if parameter.requires_grad:
            plain = recipe.weight_decay_on_norm or (parameter.ndim > 1 and name not in spared)
            key = (scales.get(name, 1.0), recipe.weight_decay if plain else 0.0)
            groups.setdefault(key, []).append(parameter)
    lr = peak_lr(recipe)
    return [
        {"params": parameters, "lr": lr * scale, "weight_decay": decay, "lr_scale": scale}
        for (scale, decay), parameters in groups.items()
    ]


def _scales(recipe: Recipe, student: nn.Module, example: Tensor | None) -> dict[str, float]:
    """The rate of each of the student's parameters over the run's, by its name in the transfer."""
    scales: dict[str, float] = {}
    head: list[str] = []
    if recipe.head_lr is not None or recipe.layer_decay is not None:
        head = head_parameters(student, _classes(student, example))
    if recipe.layer_decay is not None:
        layers = layer_numbers(student, head, example)
        last = max(layers.values())
        scales = {
            f"student.{name}": recipe.layer_decay ** (last - layer)
            for name, layer in layers.items()
        }
    if recipe.head_lr is not None:
        scales |= {f"student.{name}": recipe.head_lr / recipe.lr for name in head}
    return scales


def _classes(student: nn.Module, example: Tensor | None) -> int | None:
    if example is None:
        return None
    with evaluating(student):
        return int(student(example).shape[1])


def layer_numbers(student: nn.Module, head: list[str], example: Tensor | None) -> dict[str, int]:
    """{parameter: layer}, input to output, the head being the last: timm's own layers, or else the stages.

    Raises:
        UserError: where a network that is not timm's shows no stages.
    """
    if callable(matcher := getattr(student, "group_matcher", None)):
        from timm.models import group_parameters

        return dict(group_parameters(student, matcher(coarse=False), reverse=True))
    if example is None:
        raise UserError(
            "layer_decay needs example=, a batch as the student sees it, to find its stages with"
        )
    names = [s.name for s in stages(student, example)]
    order = {name: i for i, (name, _) in enumerate(student.named_modules())}
    ends = sorted(
        max(i for n, i in order.items() if n == s or n.startswith(f"{s}.")) for s in names
    )
    found = {}
    for name, _ in student.named_parameters():
        place = order[name.rpartition(".")[0]]
        # What follows the last stage, and is not the head, goes with it.
        found[name] = (
            len(ends) if name in head else min(sum(end < place for end in ends), len(ends) - 1)
        )
    used = sorted(set(found.values()))
    return {name: used.index(layer) for name, layer in found.items()}


def make_scheduler(
    recipe: Recipe, optimizer: Optimizer, steps_per_epoch: int, total_steps: int
) -> LRScheduler:
    """The learning rate of each step; with `step`, it drops at the *start* of each milestone epoch, counted from 1."""
    if recipe.schedule == "one-cycle":
        # A quarter of 4 steps would be a warm-up of no length, by which PyTorch divides.
        peaks = [peak_lr(recipe) * g.get("lr_scale", 1.0) for g in optimizer.param_groups]
        return OneCycleLR(
            optimizer, peaks, total_steps=max(total_steps, 5), pct_start=0.25, anneal_strategy="linear",
            cycle_momentum=False, div_factor=10, final_div_factor=1e4,
        )  # fmt: skip
    if recipe.schedule == "cosine":
        return CosineAnnealingLR(optimizer, total_steps)
    if recipe.schedule == "step":
        drops = [(m - 1) * steps_per_epoch for m in recipe.milestones]
        return MultiStepLR(optimizer, drops, recipe.lr_decay)
    return ConstantLR(optimizer, 1.0, 0)


def warm_up(step: int, warm_up_steps: int) -> float:
    """The factor on the scheduled rate at `step`, counted from 0: 1/n, 2/n, … 1 over the first n steps, then 1."""
    return min(1.0, (step + 1) / max(warm_up_steps, 1))


class Update:
    """One step of the optimiser: gradients clipped, the scheduled rates warmed up."""

    def __init__(
        self, recipe: Recipe, optimizer: Optimizer, transfer: Transfer, steps_per_epoch: int
    ):
        self.optimizer, self.clip_norm = optimizer, recipe.clip_norm
        self.parameters = list(transfer.trainable_parameters())
        self.warm_up_steps = round(recipe.warmup_epochs * steps_per_epoch)

    def lr(self, step: int) -> float:
        """The run's rate at `step`, which that of every group is a multiple of."""
        group = self.optimizer.param_groups[0]
        return float(group["lr"] / group.get("lr_scale", 1.0) * warm_up(step, self.warm_up_steps))

    def __call__(self, apply: Callable[[], Any], step: int) -> None:
        """`apply` is the optimiser's step, as the engine has wrapped it."""
        if self.clip_norm is not None:
            # A norm that is not finite makes the weights so, which is seen before they are saved.
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        if step >= self.warm_up_steps:
            apply()
            return
        # The schedules compute a rate from the one before: each gets back what it had set.
        scheduled = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] *= warm_up(step, self.warm_up_steps)
        apply()
        for group, lr in zip(self.optimizer.param_groups, scheduled, strict=True):
            group["lr"] = lr


def describe_rates(recipe: Recipe, optimizer: Optimizer) -> list[str]:
    """Lines for the start of a run, where its rates are not simply `lr`."""
    lines = []
    if recipe.lr_reference_batch is not None:
        lines.append(
            f"learning rate {peak_lr(recipe):g} = {recipe.lr:g} × batch {recipe.batch_size} / "
            f"{recipe.lr_reference_batch}"
        )
    if recipe.head_lr is not None or recipe.layer_decay is not None:
        counts: dict[float, int] = {}
        for group in optimizer.param_groups:
            rate = group["lr_scale"] * peak_lr(recipe)
            counts[rate] = counts.get(rate, 0) + sum(p.numel() for p in group["params"])
        lines.append(
            "learning rates by layer: "
            + ", ".join(f"{r:.3g} ({n:,} weights)" for r, n in sorted(counts.items()))
        )
    return lines


def make_mix(recipe: Recipe, classes: int) -> Mix | None:
    """Mixup (Zhang et al., 2018) or CutMix (Yun et al., 2019) of a float batch and its labels (N,) -> (N, K).

    With both, one is drawn for each batch. The draws are from torch's global generator, whose state a run keeps.
    """
    if not recipe.mixup and not recipe.cutmix:
        return None
    from torchvision.transforms import v2

    found: list[Any] = []
    if recipe.mixup:
        found.append(v2.MixUp(alpha=recipe.mixup, num_classes=classes))
    if recipe.cutmix:
        found.append(v2.CutMix(alpha=recipe.cutmix, num_classes=classes))
    chosen = v2.RandomChoice(found) if len(found) > 1 else found[0]

    def mix(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = chosen(x, y)
        return x.contiguous(memory_format=torch.channels_last), y

    return mix


def make_average(recipe: Recipe, student: nn.Module) -> Any:
    """The exponential moving average of weights and running statistics, `.module`; None where it is off.

    At step t the decay is at most 1 − (1 + t)^(−2/3), so that the first weights are soon forgotten.
    """
    if recipe.ema is None:
        return None
    from timm.utils import ModelEmaV3

    return ModelEmaV3(student, decay=recipe.ema, use_warmup=True)


def training_mode(transfer: Transfer, freeze_bn: bool) -> None:
    """Training mode; with `freeze_bn` the student's batch normalisation keeps to its statistics, and leaves them."""
    transfer.train()
    if freeze_bn:
        norms = [
            m for m in transfer.student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        if not norms:
            raise UserError(
                "--freeze-bn is given, but the student has no batch normalisation: leave it out"
            )
        for module in norms:
            module.eval()
