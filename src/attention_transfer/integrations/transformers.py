"""`AttentionTransferTrainer`: attention transfer in the `Trainer` of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from ..methods.activation import ActivationTransfer
from ..methods.base import Method
from ..transfer import Transfer

try:
    from transformers import Trainer
except ImportError as error:
    raise UserError(
        "transformers is not installed: pip install 'attention-transfer[transformers]'"
    ) from error


class AttentionTransferTrainer(Trainer):
    """A `Trainer` for image classification whose model learns from a teacher.

    Model and teacher are image classifiers of transformers; their inputs are `pixel_values` and
    `labels`. Checkpoints and `save_model` contain the model only, as `save_pretrained` writes it.
    Evaluation runs the model without the teacher.

    Args:
        model: trained in place; `trainer.student`.
        args: `TrainingArguments`.
        teacher: a trained classifier of the same classes.
        example: `pixel_values` (N, C, H, W), best about 32 training images. The pairs of layers and
            β = "auto" are determined from them.
        methods: by default `ActivationTransfer()`.
        pairs: as in `Transfer`: "auto", "last2", or [(layer of the model, layer of the teacher)].
        kwargs: as in `Trainer`: `train_dataset`, `eval_dataset`, `data_collator`, ….

    Raises:
        UserError: (a ValueError) as `Transfer`, and for `compute_loss_func` or several GPUs in one
            process.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any = None,
        *,
        teacher: nn.Module,
        example: Tensor,
        methods: Sequence[Method] | None = None,
        pairs: str | Sequence[tuple[str, str]] = "auto",
        **kwargs: Any,
    ):
        if not isinstance(pairs, str):
            # `Logits` holds each network as its child `model`.
            pairs = [(f"model.{s}", f"model.{t}") for s, t in pairs]
        if kwargs.get("compute_loss_func") is not None:
            raise UserError(
                "compute_loss_func is given, but the loss is that of the methods and the "
                "cross-entropy: leave it out, or write your loss as a Method"
            )
        methods = [ActivationTransfer()] if methods is None else methods
        device = next(model.parameters()).device
        transfer = Transfer(
            Logits(model),
            Logits(teacher.to(device)),
            methods,
            pairs,
            example.to(device),
            label_smoothing=getattr(args, "label_smoothing_factor", 0.0),
        )
        super().__init__(model=TransferModel(transfer), args=args, **kwargs)
        # `Transfer` smooths the labels; the Trainer would take them out of the batch.
        self.label_smoother = None
        if self.args.n_gpu > 1:
            raise UserError(
                "nn.DataParallel copies the model in every step, without its hooks: start one "
                "process per GPU (torchrun), or make one GPU visible (CUDA_VISIBLE_DEVICES)"
            )

    @property
    def transfer_model(self) -> TransferModel:
        return self.accelerator.unwrap_model(self.model)

    @property
    def student(self) -> nn.Module:
        """The model that is trained."""
        return self.transfer_model.student

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any):
        self.transfer_model.progress = min(
            1.0, self.state.global_step / max(1, self.state.max_steps)
        )
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # With the student as its model, the Trainer writes only the student.
        trained, self.model = self.model, self.student
        try:
            super()._save(output_dir, self.model.state_dict())
        finally:
            self.model = trained

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # The file may have older names than the modules; `from_pretrained` converts them.
        student: Any = self.student
        loaded = type(student).from_pretrained(resume_from_checkpoint)
        student.load_state_dict(loaded.state_dict())

    def _load_best_model(self) -> None:
        # For `load_best_model_at_end`; this file contains only the student as well.
        best: Any = self.state.best_model_checkpoint
        self._load_from_checkpoint(best)


class Logits(nn.Module):
    """A classifier of transformers as images -> logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


class TransferModel(nn.Module):
    """The module that the Trainer trains, and wraps for several processes.

    In training mode it returns the loss of a `Transfer`; in eval mode the model's own outputs.
    """

    def __init__(self, transfer: Transfer):
        super().__init__()
        self.transfer = transfer
        self.progress = 0.0
        self.config = getattr(self.student, "config", None)  # the Trainer reads it

    @property
    def student(self) -> nn.Module:
        return self.transfer.student.get_submodule("model")

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        if not self.training:
            return self.student(pixel_values=pixel_values, labels=labels)
        if labels is None:
            raise UserError("a training batch lacks labels: expected pixel_values and labels")
        out = self.transfer(pixel_values, labels, self.progress)
        return {"loss": out.loss, "logits": out.logits}
