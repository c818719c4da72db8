"""Mixed images, averaged weights, frozen batch normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..transfer import Transfer
from .options import LabelOptions, TrainingOptions

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def make_mix(options: LabelOptions, classes: int) -> Mix | None:
    """Mixup (Zhang et al., 2018) or CutMix (Yun et al., 2019) of a float batch and its labels.

    Labels (N,) become probabilities (N, K). With both, one is drawn for each batch. The draws
    come from torch's global generator, whose state is part of the checkpoint.
    """
    from torchvision.transforms import v2

    mixes: list[Any] = []
    if options.mixup:
        mixes.append(v2.MixUp(alpha=options.mixup, num_classes=classes))
    if options.cutmix:
        mixes.append(v2.CutMix(alpha=options.cutmix, num_classes=classes))
    if not mixes:
        return None
    # RandomChoice draws a random number even for one choice, which would change the run's results.
    chosen = v2.RandomChoice(mixes) if len(mixes) > 1 else mixes[0]

    def mix(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = chosen(x, y)
        # The transforms return the default memory format, and the networks are channels_last.
        return x.contiguous(memory_format=torch.channels_last), y

    return mix


def make_average(options: TrainingOptions, student: nn.Module) -> Any:
    """The moving average of weights and running statistics, as `.module`; None if it is off.

    At step t the decay is at most 1 − (1 + t)^(−2/3), so that the average soon forgets the
    initial weights.
    """
    if options.ema is None:
        return None
    from timm.utils import ModelEmaV3

    return ModelEmaV3(student, decay=options.ema, use_warmup=True)


def training_mode(transfer: Transfer, freeze_bn: bool) -> None:
    """Puts `transfer` into training mode; `freeze_bn` keeps the student's running statistics.

    Raises:
        UserError: if there is no batch normalisation to freeze.
    """
    transfer.train()
    if not freeze_bn:
        return
    norm_class = nn.modules.batchnorm._BatchNorm
    norms = [m for m in transfer.student.modules() if isinstance(m, norm_class)]
    if not norms:
        raise UserError(
            "--freeze-bn is given, but the student has no batch normalisation: leave it out"
        )
    for norm in norms:
        norm.eval()
