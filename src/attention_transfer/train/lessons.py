"""The teacher's outputs for a training batch: read from a store, or computed once and stored."""

from __future__ import annotations

from collections.abc import Callable

from lightning.fabric import Fabric
from torch import Tensor

from ..store.store import TeacherStore
from ..teacher import TeacherOutput
from ..transfer import Transfer


class Lessons:
    """Gives the teacher's outputs for a batch, so that the step needs no teacher.

    Args:
        store: with the arrays that the methods read.
        transfer: whose teacher runs for images that are not in the store yet.
        say: prints a line.
    """

    def __init__(
        self,
        store: TeacherStore,
        transfer: Transfer,
        fabric: Fabric,
        say: Callable[[str], None],
    ):
        self.store, self.transfer, self.fabric, self.say = store, transfer, fabric, say
        self._layers = [layer for _, layer in transfer.pairs]
        self._has_warned = False

    def __call__(self, x: Tensor, rows: Tensor, view: int | None) -> TeacherOutput:
        """The teacher's outputs for images x (B, 3, H, W), by their numbers and their view.

        The values are those of the files, also for images whose values were computed just now: a
        run that continues reads the same bits.
        """
        assert view is not None, "a store is of fixed views"
        if self.transfer.teacher is None or self.store.has(rows, view):
            return self.store.read(rows, view, self.fabric.device)
        # On the whole batch, even if most of it is there: a compiled teacher takes one shape.
        with self.fabric.autocast():
            said = self.transfer.run_teacher(x)
        assert said.logits is not None
        features = dict(zip(self._layers, said.features, strict=True))
        output = self.store.add(rows, view, said.logits, features)  # type: ignore[arg-type]
        if self.store.note is not None and not self._has_warned:
            self._has_warned = True
            self.say(f"warning: {self.store.note}: the run goes on without adding to it")
        return output
