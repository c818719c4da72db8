"""`AttentionTransferTask`: attention transfer as a training task of timm's (`timm.task`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from timm.utils import ModelEmaV3, unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError
from ..methods.activation import ActivationTransfer
from ..methods.base import Method
from ..transfer import Transfer

try:
    from timm.task import TrainingTask
    from timm.task.classification import resolve_classification_loss
    from timm.task.distillation import DistillationTeacher
except ImportError as error:
    raise UserError(
        "this timm has no timm.task: install a newer one (pip install -U timm)"
    ) from error


class AttentionTransferTask(TrainingTask):
    """A timm student with a teacher, with EMA, DDP and `torch.compile`.

    Batches are normalised for the student, as timm's loaders return them, and are renormalised for
    the teacher. `task(input, target)` returns `loss`, `output` (the student's logits), `task_loss`
    and the weighted term of each method, such as `at_loss`.

    Args:
        student_model: trained in place.
        teacher_model: a name of timm's (with its trained weights), a module, or timm's
            `DistillationTeacher`.
        example: a batch as the student gets it, best about 32 training images. The pairs of layers
            and β = "auto" are determined from it.
        criterion, criterion_kwargs: the loss on the labels, as in timm's tasks.
        methods: by default `ActivationTransfer()`.
        pairs: as in `Transfer`.
        teacher_pretrained_path, teacher_pretrained_cfg_overlay: for a teacher that is a name.
        distill_loss_weight, task_loss_weight: factors of the methods' terms and the labels' loss.
        device, dtype, verbose: as in timm's tasks.

    Attributes:
        progress: the share of the training that is done, in [0, 1]; for methods that decay, update
            it during training.

    Raises:
        UserError: (a ValueError) as `Transfer`.
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: str | nn.Module,
        example: Tensor,
        criterion: Callable[..., Tensor] | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        methods: Sequence[Method] | None = None,
        pairs: str | Sequence[tuple[str, str]] = "auto",
        teacher_pretrained_path: str | None = None,
        teacher_pretrained_cfg_overlay: dict[str, Any] | None = None,
        distill_loss_weight: float = 1.0,
        task_loss_weight: float = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        student: Any = unwrap_model(student_model)
        teacher = teacher_model
        if not isinstance(teacher, DistillationTeacher):
            teacher = DistillationTeacher(
                teacher,
                student.num_classes,
                student.in_chans,
                teacher_pretrained_path,
                teacher_pretrained_cfg_overlay,
                self.device,
                self.dtype,
            )
        self.criterion = resolve_classification_loss(
            criterion, self.device, criterion_kwargs=criterion_kwargs
        )
        self.distill_loss_weight, self.task_loss_weight = distill_loss_weight, task_loss_weight
        self.progress: float | Tensor | None = None
        self.trainable_module: nn.Module = Transfer(
            student.to(self.device, self.dtype),
            teacher.model,
            [ActivationTransfer()] if methods is None else methods,
            pairs,
            example.to(self.device, self.dtype),
            teacher_transform=_Renormalize(student.pretrained_cfg, teacher),
        ).to(self.device)

    @property
    def transfer(self) -> Transfer:
        """The `Transfer` that holds the student, the frozen teacher and the methods."""
        return unwrap_model(self.trainable_module)

    def prepare_distributed(
        self, device_ids: list[int] | None = None, **ddp_kwargs: Any
    ) -> AttentionTransferTask:
        """Wraps the trained module in DDP; the teacher is not part of it."""
        self.trainable_module = DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(  # type: ignore[override]  # the signature of timm's own tasks
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compiles teacher and student for training, and the student for evaluation."""
        options = {"backend": backend, "mode": mode, **compile_kwargs}
        self.transfer.compile(**options)
        self.eval_model = cast(nn.Module, torch.compile(self.transfer.student, **options))
        return self.eval_model

    def setup_ema(
        self,
        decay: float = 0.9999,
        use_warmup: bool = False,
        device: torch.device | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        """Averages the student only; a copy of the trained module would copy the teacher."""
        options = {"decay": decay, "use_warmup": use_warmup, "device": device, **kwargs}
        self.trainable_module_ema = ModelEmaV3(self.transfer.student, **options)
        return self.trainable_module_ema

    def update_ema(self, step: int | None = None) -> None:
        if self.has_ema():
            self.trainable_module_ema.update(self.transfer.student, step=step)

    def get_eval_model(
        self, module: nn.Module | None = None, ema: bool = False
    ) -> nn.Module | None:
        model = super().get_eval_model(module, ema)
        inner = None if model is None else unwrap_model(model)
        return inner.student if isinstance(inner, Transfer) else model

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        parameters = list(self.transfer.student.parameters())
        adapters = [p for method in self.transfer.methods for p in method.parameters()]
        if exclude_head:
            # As timm's own tasks do: the last two parameters are the head's weight and bias.
            parameters = parameters[:-2]
        return parameters + adapters

    def get_task_state(
        self, module: nn.Module | None = None, ema: bool = False
    ) -> dict[str, dict[str, Tensor]]:
        """The state of the methods: adapters, and the β of "auto"."""
        if ema:
            return {}
        return {"methods": self.transfer.get_submodule("methods").state_dict()}

    def load_task_state(
        self,
        state: dict[str, dict[str, Tensor]] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        if state and not ema:
            methods = self.transfer.get_submodule("methods")
            methods.load_state_dict(state["methods"], strict=strict)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        out = self.trainable_module(input, target, self.progress)
        share: float | Tensor = 1.0
        for method in self.transfer.methods:
            share = share * method.cross_entropy_share(self.progress)
        task_loss = self.criterion(out.logits, target)
        # `criterion` replaces the cross-entropy of `Transfer`.
        terms = {f"{name}_loss": term for name, term in out.parts.items() if name != "ce"}
        loss = self.task_loss_weight * share * task_loss
        for term in terms.values():
            loss = loss + self.distill_loss_weight * term
        return {"loss": loss, "output": out.logits, "task_loss": task_loss, **terms}


class _Renormalize(nn.Module):
    """A batch normalised for the student -> the same batch normalised for the teacher."""

    def __init__(self, student_config: dict[str, Any], teacher: DistillationTeacher):
        super().__init__()
        teacher_mean, teacher_std = teacher.get_buffer("mean_kd"), teacher.get_buffer("std_kd")
        mean, std = (
            torch.as_tensor(student_config[key]).view(1, -1, 1, 1).to(teacher_mean)
            for key in ("mean", "std")
        )
        self.register_buffer("scale", std / teacher_std, persistent=False)
        self.register_buffer("shift", (mean - teacher_mean) / teacher_std, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.get_buffer("scale") + self.get_buffer("shift")
