"""`AttentionTransferModule`: a `Transfer` as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from ..transfer import Transfer


class AttentionTransferModule(LightningModule):
    """Trains the student of a `Transfer` in a Lightning `Trainer`.

    Batches are (images, labels). It logs `train_loss`, each weighted term as `train_NAME`, and
    `val_loss` and `val_accuracy` of the student. `module(x)` returns the student's logits. The
    teacher moves to the device with the module; checkpoints do not contain it.

    Args:
        transfer: student, teacher and methods; `transfer.student` is trained in place.
        optimizer: parameters -> optimizer; by default AdamW. For schedules override
            `configure_optimizers`.
    """

    def __init__(
        self,
        transfer: Transfer,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    ):
        super().__init__()
        self.transfer = transfer
        self.make_optimizer = optimizer or torch.optim.AdamW

    def forward(self, x: Tensor) -> Tensor:
        return self.transfer.student(self.transfer.student_transform(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        x, y = batch
        out = self.transfer(x, y, self.progress())
        self.log("train_loss", out.loss.detach(), prog_bar=True)
        for name, term in out.parts.items():
            self.log(f"train_{name}", term.detach())
        return out.loss

    def progress(self) -> Tensor:
        """The share of the training that is done: a tensor, so that a compiler takes it as data."""
        share = self.trainer.global_step / max(1, self.trainer.estimated_stepping_batches)
        return torch.tensor(min(1.0, share), device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        x, y = batch
        logits = self(x)
        accuracy = (logits.argmax(1) == y).float().mean()
        self.log("val_loss", F.cross_entropy(logits, y), sync_dist=True)
        self.log("val_accuracy", accuracy, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.transfer.trainable_parameters())
