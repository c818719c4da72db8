"""The training loop: steps, running sums on the device, checkpoints, one row of metrics an epoch."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from ..apply.inference import as_input
from ..config import Recipe
from ..data import Augment, Stream
from ..errors import LocalError, RunError, UserError
from ..run_folder import RunFolder, replacing
from ..runtime.cuda_graphs import CudaGraphs
from ..transfer import Transfer
from .meter import KEPT, Meter
from .optimizer import Mix, Update, make_optimizer, make_scheduler, peak_lr, training_mode
from .progress import ProgressBar

Row = dict[str, Any]
SIGNAL_SYNC_STEPS = 20  # steps: so often several processes ask one another for a signal


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a termination signal, after the state was saved."""

    def __init__(self) -> None:
        super().__init__("the state is saved; run the same command again to continue")


class Trainer:
    """Trains a `Transfer` epoch by epoch; `run()` continues from `checkpoint.pt` where there is one.

    Args:
        example: a batch as the student sees it, for rates by layer.
        mix: mixes the images and labels of a batch.
        average: keeps the moving average of the student's weights (`make_average`).
        graphs: given where compiled steps are replayed as CUDA graphs.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        fabric: Fabric,
        transfer: Transfer,
        augment: Augment | Stream,
        validate: Callable[[], dict[str, float]],
        progress: ProgressBar,
        *,
        example: Tensor | None = None,
        mix: Mix | None = None,
        average: Any = None,
        graphs: CudaGraphs | None = None,
    ):
        self.recipe, self.folder, self.fabric = recipe, folder, fabric
        self.augment, self.validate, self.progress = augment, validate, progress
        self.mix, self.average, self.graphs = mix, average, graphs
        self.batch_size = min(recipe.batch_size, len(augment.images))
        if self.batch_size < fabric.world_size:
            raise UserError(
                f"a batch of {self.batch_size} images is too small for {fabric.world_size} processes"
            )
        if self.batch_size // fabric.world_size < recipe.accumulate:
            each = "" if fabric.world_size == 1 else f" over {fabric.world_size} processes"
            raise UserError(
                f"a batch of {self.batch_size} images{each} cannot be had in {recipe.accumulate} parts"
            )
        self.steps_per_epoch = len(augment.epoch(recipe.seed, 0, self.batch_size))
        self.total_steps = min(recipe.epochs * self.steps_per_epoch, recipe.max_steps or 1 << 62)
        self.plain = transfer
        self.optimizer = make_optimizer(recipe, transfer, example)
        self.scheduler = make_scheduler(
            recipe, self.optimizer, self.steps_per_epoch, self.total_steps
        )
        self.update = Update(recipe, self.optimizer, transfer, self.steps_per_epoch)
        self.transfer, self.wrapped_optimizer = fabric.setup(transfer, self.optimizer)
        self.parts = ["ce", *(m.part for m in transfer.methods)]
        self.meter = Meter(self.parts, fabric.device)
        self.step = 0
        self.lr = peak_lr(recipe)
        self.seconds = 0.0
        self.rows: list[Row] = []
        self.log: Callable[[list[Row]], None] = lambda rows: None  # gets the rows so far
        self.stop_signal: int | None = None

    def run(self) -> list[Row]:
        """Trains to the end; the rows of metrics.

        Raises:
            Interrupted: after a signal, the state saved.
            RunError: for a loss that is not finite, or a file that cannot be written.
        """
        self._load()
        self.log(self.rows)
        with self._signals(), self.progress:
            while not self.rows or self.rows[-1]["step"] < self.total_steps:
                self._epoch()
        return self.rows

    def _epoch(self) -> None:
        epoch, first = divmod(self.step, self.steps_per_epoch)
        if not first and self.step > (self.rows[-1]["step"] if self.rows else 0):
            # An unreadable validation image ended the last epoch: its steps are done, its row is still to come.
            epoch, first = epoch - 1, self.steps_per_epoch
            if not self.meter.images:
                raise RunError(
                    f"{self.folder} has lost epoch {epoch + 1} of metrics.jsonl: put it back, or start anew"
                )
        plan = self.augment.epoch(self.recipe.seed, epoch, self.batch_size)
        end = min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)
        training_mode(self.plain, self.recipe.freeze_bn)
        start = time.perf_counter()
        self.progress.begin(epoch + 1, self.step, self.total_steps)
        for step in range(first, end):
            with self._saving(start):
                batch = self._batch(plan, step)
            self._step(*batch)
            if self.graphs is not None:
                self.graphs.check()
            self.progress.tick(self.step, self.batch_size, self.meter)
            if (
                step + 1 < end
                and (self.fabric.world_size == 1 or (step + 1) % SIGNAL_SYNC_STEPS == 0)
                and self._stopped()
            ):
                self._sync()
                self.seconds += time.perf_counter() - start
                self._save()
                self.fabric.barrier()  # or the end of another process may end this one while it writes
                raise Interrupted
        self._sync()
        training = time.perf_counter() - start
        rate = (end - first) * self.batch_size / training
        self._check()
        loss, accuracy, parts = self.meter.means(self.fabric)
        self.plain.eval()
        with self._saving(start):
            val = self.validate()
        if not math.isfinite(val["loss"]):
            raise RunError(f"the validation loss is not finite after step {self.step}; {KEPT}")
        self.seconds += time.perf_counter() - start
        row: Row = {
            "epoch": epoch + 1,
            "step": self.step,
            "lr": self.lr,
            "train_loss": loss,
            "val_loss": val["loss"],
            "train_accuracy": accuracy,
            "val_accuracy": val["accuracy"],
            **({"val_top5": val["top5"]} if "top5" in val else {}),
            "parts": parts,
            "weights": self.plain.weights(min(1.0, (self.step - 1) / self.total_steps)),
            "images_per_second": rate,
            "seconds": self.seconds,
        }
        self.rows.append(row)
        self.meter = Meter(self.parts, self.fabric.device)
        self._save()
        self.log(self.rows)
        self.progress.end(row)
        if self._stopped() and self.step < self.total_steps:
            raise Interrupted

    @contextmanager
    def _saving(self, start: float) -> Iterator[None]:
        """An image that cannot be read, met while training: what was computed so far is saved first."""
        try:
            yield
        except UserError as error:
            if self.fabric.world_size > 1:  # the others wait for its gradients
                raise LocalError(str(error)) from error
            if not self.step:
                raise
            self.seconds += time.perf_counter() - start
            self._save()
            raise UserError(
                f"{error}; the state is saved: run the command again to continue"
            ) from error

    def _stopped(self) -> bool:
        """Whether any process got a signal."""
        if self.fabric.world_size == 1:
            return self.stop_signal is not None
        told = torch.tensor(float(self.stop_signal is not None), device=self.fabric.device)
        return bool(self.fabric.all_reduce(told, reduce_op="sum"))

    def _batch(self, plan: Any, step: int) -> tuple[Tensor, Tensor]:
        """This process's share of a batch: every world_size-th image of it."""
        x, y = self.augment.batch(plan, step)
        world, rank = self.fabric.world_size, self.fabric.global_rank
        if world > 1 and not self.augment.is_sharded:
            even = len(y) // world * world
            x, y = x[rank:even:world], y[rank:even:world]
        return as_input(x), y

    def _step(self, x: Tensor, y: Tensor) -> None:
        # A 0-d tensor, so that a compiled Transfer sees a new value and not a new constant.
        progress = torch.full((), self.step / self.total_steps, device=self.fabric.device)
        self.lr = self.update.lr(self.step)
        if self.mix is not None:
            x, y = self.mix(x, y)
        if self.recipe.accumulate == 1:
            self._backward(x, y, progress)
        else:
            parts = list(
                zip(*(t.tensor_split(self.recipe.accumulate) for t in (x, y)), strict=True)
            )
            for i, (some, labels) in enumerate(parts, 1):
                with self.fabric.no_backward_sync(self.transfer, enabled=i < len(parts)):
                    self._backward(some, labels, progress, len(labels) / len(y))
        self.update(self.wrapped_optimizer.step, self.step)
        self.wrapped_optimizer.zero_grad()
        self.step += 1
        if self.average is not None:
            self.average.update(self.plain.student, self.step)
        if self.step < self.total_steps:
            self.scheduler.step()

    def _backward(self, x: Tensor, y: Tensor, progress: Tensor, share: float = 1.0) -> None:
        """Adds the gradient of `share` of the loss to what is there."""
        if self.graphs is not None:
            self.graphs.begin()
        output = self.transfer(x, y, progress)
        self.fabric.backward(output.loss if share == 1 else output.loss * share)
        self.meter.update(output.logits, y, output.parts, self.step + 1)

    def _sync(self) -> None:
        if self.fabric.device.type == "cuda":
            torch.cuda.synchronize()

    def _save(self) -> None:
        """Metrics and checkpoint, each whole or not at all; never a state that is not finite."""
        self._check()
        meter = self.meter.state_dict(self.fabric)
        if not self.fabric.is_global_zero:
            return
        state = {
            "transfer": self.plain.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {
                k: v
                for k, v in self.scheduler.state_dict().items()
                if isinstance(v, (int, float, list))
            },
            "meter": meter,
            "step": self.step,
            "seconds": self.seconds,
            "lr": self.lr,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.fabric.device.type == "cuda" else None,
        }
        # In this order: a row too many is dropped when the run continues, one too few would be missing for good.
        self.folder.write_metrics(self.rows)
        save_checkpoint(self.folder.checkpoint_file, state)

    def _check(self) -> None:
        """Raises `RunError` for a loss, or weights that the last step left, that are not finite."""
        self.meter.check()
        kept = [self.plain.state_dict(), {} if self.average is None else self.average.state_dict()]
        state = [v for values in kept for v in values.values() if v.is_floating_point()]
        if not torch.stack([v.isfinite().all() for v in state]).all():
            raise RunError(f"the weights are not finite after step {self.step}; {KEPT}")

    def _load(self) -> None:
        file = self.folder.checkpoint_file
        if not file.is_file():
            return
        try:
            state = torch.load(file, map_location=self.fabric.device, weights_only=True)
        except Exception as error:
            raise RunError(
                f"{file} cannot be read ({str(error).splitlines()[0]}): remove the run folder to start anew"
            ) from error
        self.plain.load_state_dict(state["transfer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.meter.load_state_dict(state["meter"], self.fabric)
        self.step, self.seconds, self.lr = state["step"], state["seconds"], state.get("lr", self.lr)
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu())
        self.rows = [r for r in self.folder.metrics() if r["step"] <= self.step]
        self.progress.say(f"continuing {self.folder} at step {self.step} of {self.total_steps}")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the loop after the step that is running; a second Ctrl-C at once."""

        def stop(number: int, frame: Any) -> None:
            if self.stop_signal is not None:
                if number == signal.SIGINT:
                    raise KeyboardInterrupt
                return  # SIGTERM may come twice, to the whole group and handed on by a parent
            self.stop_signal = number
            self.progress.say("stopping after this step; the state is saved first")

        with handling(stop, signal.SIGINT, signal.SIGTERM):
            yield


@contextmanager
def handling(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    """These signals go to `handler` meanwhile; not outside of the main thread, where they are somebody else's."""
    try:
        earlier = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:
        earlier = {}
    try:
        yield
    finally:
        for number, before in earlier.items():
            signal.signal(number, before)


def save_checkpoint(file: Path, state: dict[str, Any]) -> None:
    """`torch.save`, whole or not at all, and on the disk before it takes the place of the last one.

    Raises:
        RunError: where it cannot be written; the last checkpoint is kept.
    """
    try:
        with replacing(file) as partial, open(partial, "wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
    except RunError:
        raise
    except (OSError, RuntimeError) as error:
        why = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else str(error).splitlines()[0]
        )
        raise RunError(
            f"cannot write {file}: {why}; the last good one is kept: make room and run the command again"
        ) from error
