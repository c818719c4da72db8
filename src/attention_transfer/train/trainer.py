"""The training loop: steps, and at the end of each epoch validation, metrics and a checkpoint."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from ..apply.inference import as_input
from ..data.plan import TrainingBatch
from ..errors import RunError
from ..run_folder import RunFolder
from ..runtime.cuda_graphs import CudaGraphs
from ..runtime.ranks import gather, highest
from ..transfer import Transfer
from . import shares
from .checkpoint import load_checkpoint, save_checkpoint
from .gradient_watch import GradientWatch
from .meter import Meter
from .optimizer import Update, make_optimizer, make_scheduler, peak_lr
from .options import OptimizerOptions, TrainingOptions
from .progress import ProgressBar
from .regularize import training_mode
from .rescue import Rescue
from .signals import Interrupted, StopRequest, signal_handlers
from .state_checks import load_optimization
from .watch import Watch

if TYPE_CHECKING:
    from ..data.augment import Augment
    from ..data.plan import EpochPlan
    from ..data.stream import Stream
    from .regularize import Mix

Row = dict[str, Any]
ADVICE = "the last good checkpoint is kept; try a lower --lr or --beta in another --out"
# Steps between checks for a signal across ranks; each check costs a synchronisation.
SIGNAL_SYNC_STEPS = 20


class Trainer:
    """Trains a `Transfer`; `train()` continues from `checkpoint.pt` if there is one.

    Args:
        loader: makes the batches of an epoch.
        validate: returns `loss`, `accuracy` and perhaps `top5` of the validation images.
        example: a batch after the student's preprocessing, for learning rates by layer.
        mix: mixes the images and labels of a batch.
        average: keeps the moving average of the student's weights (`make_average`).
        graphs: whether compiled steps are replayed as CUDA graphs.

    Raises:
        UserError: if a batch has fewer images than processes or micro-batches.
    """

    def __init__(
        self,
        options: TrainingOptions,
        optimizer_options: OptimizerOptions,
        folder: RunFolder,
        fabric: Fabric,
        transfer: Transfer,
        loader: Augment | Stream,
        validate: Callable[[], dict[str, float]],
        progress: ProgressBar,
        *,
        example: Tensor | None = None,
        mix: Mix | None = None,
        average: Any = None,
        graphs: bool = False,
    ):
        self.options, self.folder, self.fabric = options, folder, fabric
        self.loader, self.validate, self.progress = loader, validate, progress
        self.mix, self.average = mix, average
        self.graphs = CudaGraphs() if graphs else None
        self.batch_size = min(options.batch_size, len(loader.images))
        shares.check_batch_size(self.batch_size, fabric.world_size, options.accumulate)
        self.steps_per_epoch = len(loader.epoch(options.seed, 0, self.batch_size))
        self.total_steps = options.epochs * self.steps_per_epoch
        if options.max_steps is not None:
            self.total_steps = min(self.total_steps, options.max_steps)

        self.lr = peak_lr(optimizer_options, options.batch_size)
        self.module = transfer
        self.optimizer = make_optimizer(optimizer_options, transfer, example, self.lr)
        self.scheduler = make_scheduler(
            optimizer_options, self.optimizer, self.steps_per_epoch, self.total_steps
        )
        self.update = Update(
            optimizer_options, self.optimizer, transfer.trainable_parameters(), self.steps_per_epoch
        )
        # State is read from and written to `module`, whose names have no prefix of a wrapper.
        self.transfer, self.wrapped_optimizer = fabric.setup(transfer, self.optimizer)
        self.terms = ["ce", *(method.name for method in transfer.methods)]
        self.meter = self._new_meter()
        self.gradients = GradientWatch(transfer.named_parameters(), fabric.device)
        self.rescue = Rescue(fabric, transfer, self._save_in_mid_epoch)
        self.stop = StopRequest(progress.say)
        self.watch = Watch(progress.say, len(loader.images.classes), transfer.methods)
        # The teacher's outputs for images (`StoredOutputs`); None: run the teacher in the step.
        self.teacher_outputs: Callable[..., Any] = lambda x, rows, view: None
        self.log: Callable[[list[Row]], None] = lambda rows: None  # called with all rows so far
        self.step = 0
        self.seconds = 0.0
        self.rows: list[Row] = []
        self._epoch_start = 0.0

    def train(self) -> list[Row]:
        """Trains to the end; returns the rows of metrics.jsonl.

        Raises:
            Interrupted: after a signal, once the state is saved.
            RunError: if the loss is not finite or a file cannot be written.
        """
        if self.folder.has_checkpoint:
            self._continue()
        # A killed run may have saved an epoch without logging it.
        self.log(self.rows)
        with signal_handlers(self.stop, signal.SIGINT, signal.SIGTERM), self.progress:
            while not self.rows or self.rows[-1]["step"] < self.total_steps:
                self.train_epoch()
        return self.rows

    def train_epoch(self) -> None:
        """Trains to the end of the epoch, validates and saves."""
        epoch, first = self._position()
        last = min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)
        plan = self.loader.epoch(self.options.seed, epoch, self.batch_size)
        training_mode(self.module, self.options.freeze_bn)
        self.progress.begin(epoch + 1, self.step, self.total_steps)
        self._epoch_start = time.perf_counter()
        for step in range(first, last):
            with self.rescue.reading(self.step):
                batch = self._batch(plan, step)
            with self.rescue.training(self.step, self.meter):
                self.train_step(batch, plan.view)
            self.progress.update(self.step, self.batch_size, self.meter)
            # After the last step, the end of the epoch saves the state.
            if step + 1 < last and self._shall_stop():
                self._save_in_mid_epoch()
                # Wait for rank 0 to write: torchrun kills all ranks when one has ended.
                self.fabric.barrier()
                raise Interrupted
        images = (last - first) * shares.shared_images(self.batch_size, self.fabric.world_size)
        images_per_second = images / self._elapsed()
        if first == last:  # only the validation is left to do
            with self.rescue.reading(self.step):
                batch = self._batch(plan, last - 1)
        progress = (self.step - 1) / self.total_steps  # of the last step
        teacher_outputs = partial(self.teacher_outputs, view=plan.view)
        gradients = self.watch.measure(self.module, batch, progress, teacher_outputs)
        row = self._finish_epoch(epoch, images_per_second) | gradients
        self.rows.append(row)
        self.watch.check_balance(self.rows, self.step / self.total_steps)
        self.watch.check_layers(self.module, batch, self.gradients)
        self.meter = self._new_meter()
        self.gradients.begin_epoch()
        self._save()
        # After the checkpoint: a logger must not have an epoch that a continued run repeats.
        self.log(self.rows)
        self.progress.end(row)
        if highest(self.stop.received) and self.step < self.total_steps:
            raise Interrupted

    def train_step(self, batch: TrainingBatch, view: int | None = None) -> None:
        """One step of the optimiser on images (N, 3, H, W) in [0, 1], all in the same view."""
        x, y, rows = batch
        # A tensor, because a compiled Transfer would recompile for each value of a float.
        progress = torch.full((), self.step / self.total_steps, device=self.fabric.device)
        self.lr = self.update.lr(self.step)
        if self.mix is not None:
            x, y = self.mix(x, y)
        count = self.options.accumulate
        micro_batches = zip(*(part.tensor_split(count) for part in (x, y, rows)), strict=True)
        for i, micro_batch in enumerate(micro_batches, 1):
            # Ranks exchange gradients after the last micro-batch only.
            with self.fabric.no_backward_sync(self.transfer, enabled=i < count):
                self._backward(TrainingBatch(*micro_batch), view, progress, len(y))
        self.rescue.changes_weights = True
        # Before clipping, which would spread a NaN to the gradients of all layers.
        self.gradients.update()
        self.update(self.wrapped_optimizer.step, self.step)
        self.wrapped_optimizer.zero_grad()
        self.step += 1
        if self.average is not None:
            self.average.update(self.module.student, self.step)
        if self.step < self.total_steps:
            self.scheduler.step()
        self.rescue.changes_weights = False
        if self.graphs is not None:
            self.graphs.check()

    def state_dict(self) -> dict[str, Any]:
        """The state that a run needs to continue bit for bit, in the format of checkpoint.pt.

        All ranks must call this: the sums of the meter and the unreadable images are those of all
        ranks.
        """
        unreadable = sorted(set[int]().union(*gather(self.loader.images.bad)))
        self._add_unreadable(unreadable)
        scheduler = self.scheduler.state_dict().items()
        average = cuda_rng = None
        if self.average is not None:
            average = self.average.state_dict()
        if self.fabric.device.type == "cuda":
            cuda_rng = torch.cuda.get_rng_state()
        return {
            "transfer": self.module.state_dict(),
            "average": average,
            "optimizer": self.optimizer.state_dict(),
            # Without the functions that torch's schedulers hold, which weights_only refuses.
            "scheduler": {k: v for k, v in scheduler if isinstance(v, (int, float, list))},
            "meter": self.meter.state_dict(self.fabric),
            "step": self.step,
            "seconds": self.seconds,
            "lr": self.lr,
            "seed": self.options.seed,
            "rng": torch.get_rng_state(),
            "cuda_rng": cuda_rng,
            "rows": self.rows,
            "unreadable": unreadable,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state`, as `state_dict` returned it."""
        self.step, self.seconds = state["step"], state["seconds"]
        if self.step > self.total_steps:
            raise ValueError(f"its step is {self.step} of {self.total_steps}")
        if state["seed"] != self.options.seed:
            raise ValueError(f"it is of seed {state['seed']}")
        load_optimization(self.optimizer, self.scheduler, state)
        self.module.load_state_dict(state["transfer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.meter.load_state_dict(state["meter"], self.fabric)
        self.lr = state["lr"]
        self._add_unreadable(state["unreadable"])
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu())
        self.rows = state["rows"]

    def _add_unreadable(self, rows: list[int]) -> None:
        """Adds to the unreadable images, which are counted at the end of the run."""
        bad = self.loader.images.bad
        if isinstance(bad, set):  # images in memory have been read already
            bad.update(rows)

    def _continue(self) -> None:
        """Loads the checkpoint or the previous one, and repairs damaged files."""
        folder, say = self.folder, self.progress.say
        file = load_checkpoint(folder, self.fabric.device, self.load_state_dict, say)
        self.fabric.barrier()  # every rank has read the file that rank 0 may rename
        if self.fabric.is_global_zero:
            if file != folder.checkpoint_file:
                # Otherwise the next save would keep the damaged file as the previous checkpoint.
                os.replace(file, folder.checkpoint_file)
            if folder.restore_metrics(self.rows):
                say(f"{folder.metrics_file} is written anew from the checkpoint")
        say(f"continuing {folder} at step {self.step} of {self.total_steps}")

    def _position(self) -> tuple[int, int]:
        """The epoch, counted from 0, and its first step that is not done yet."""
        epoch, first = divmod(self.step, self.steps_per_epoch)
        recorded = [0, *(row["step"] for row in self.rows)]
        if first or self.step == recorded[-1]:
            return epoch, first
        # An unreadable validation image ended the run after the last step of an epoch.
        return epoch - 1, self.steps_per_epoch

    def _batch(self, plan: EpochPlan, step: int) -> TrainingBatch:
        """This rank's share of a batch, as float in [0, 1]."""
        batch = self.loader.batch(plan, step)
        if not self.loader.is_sharded:
            batch = shares.own_share(batch, self.fabric.global_rank, self.fabric.world_size)
        return batch._replace(images=as_input(batch.images))

    def _backward(
        self, micro_batch: TrainingBatch, view: int | None, progress: Tensor, batch_size: int
    ) -> None:
        """Adds the gradient of a micro-batch; `batch_size` is that of this process's share."""
        x, y, rows = micro_batch
        if self.graphs is not None:
            self.graphs.begin()
        output = self.transfer(x, y, progress, teacher=self.teacher_outputs(x, rows, view))
        loss, share = output.loss, len(y) / batch_size
        if share != 1:
            loss = loss * share
        self.fabric.backward(loss)
        pair_terms = self.module.pair_terms
        self.meter.update(output.logits, y, output.parts, self.step + 1, pair_terms)

    def _finish_epoch(self, epoch: int, images_per_second: float) -> Row:
        """Validates, and returns the epoch's row."""
        self._check_finite()
        train_loss, train_accuracy, parts = self.meter.means(self.fabric)
        self.module.eval()  # until `training_mode` of the next epoch
        with self.rescue.reading(self.step):
            val = self.validate()
        if not math.isfinite(val["loss"]):
            raise RunError(f"the validation loss is not finite after step {self.step}; {ADVICE}")
        self.seconds += self._elapsed()
        row: Row = {
            "epoch": epoch + 1,
            "step": self.step,
            "lr": self.lr,
            "train_loss": train_loss,
            "val_loss": val["loss"],
            "train_accuracy": train_accuracy,
            "val_accuracy": val["accuracy"],
        }
        if "top5" in val:
            row["val_top5"] = val["top5"]
        return row | {
            "parts": parts,
            # The weights that the last step used.
            "weights": self.module.weights((self.step - 1) / self.total_steps),
            "images_per_second": images_per_second,
            "seconds": self.seconds,
        }

    def _save_in_mid_epoch(self) -> None:
        self.seconds += self._elapsed()
        self._save()

    def _shall_stop(self) -> bool:
        if self.fabric.world_size > 1 and self.step % SIGNAL_SYNC_STEPS:
            return False
        return bool(highest(self.stop.received))

    def _elapsed(self) -> float:
        """Seconds since the start of the epoch."""
        if self.fabric.device.type != "cpu":
            torch.accelerator.synchronize()  # the last steps may still be running
        return time.perf_counter() - self._epoch_start

    def _save(self) -> None:
        """Writes metrics and checkpoint, each whole or not at all; never a non-finite state."""
        self._check_finite()
        state = self.state_dict()
        if self.fabric.is_global_zero:
            self.folder.lock.check()
            self.folder.write_metrics(self.rows)
            save_checkpoint(self.folder, state)

    def _check_finite(self) -> None:
        """Raises `RunError` if the loss, or a weight after the last step, is not finite."""
        fault = self.meter.first_fault()
        if fault is not None:
            step, terms = fault
            self._check_gradients(step)
            raise RunError(f"the loss is not finite: first at step {step} in {terms}; {ADVICE}")
        values = list(self.module.state_dict().values())
        if self.average is not None:
            values += self.average.state_dict().values()
        finite = [v.isfinite().all() for v in values if v.is_floating_point()]
        # Stacked, so that the device is read once.
        if not torch.stack(finite).all():
            self._check_gradients(self.step + 1)
            raise RunError(f"the weights are not finite after step {self.step}; {ADVICE}")

    def _check_gradients(self, fault: int) -> None:
        """Raises `RunError` if a gradient was not finite before step `fault`."""
        bad = self.gradients.first_bad_layer()
        if bad is None:
            return
        steps, layer = bad
        step = self.step - self.gradients.count + steps + 1
        if step < fault:
            raise RunError(
                f"the gradient is not finite: first at step {step}, from {layer} to the input; "
                f"{ADVICE}"
            )

    def _new_meter(self) -> Meter:
        return Meter(self.terms, self.fabric.device, self.module.pairs)
