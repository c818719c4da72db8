"""The teacher's outputs for a training batch: read from a store, or computed and stored."""

from __future__ import annotations

from collections.abc import Callable

from lightning.fabric import Fabric
from torch import Tensor

from ..store.store import TeacherStore
from ..teacher import TeacherOutput
from ..transfer import Transfer


class StoredOutputs:
    """Returns the teacher's outputs for a batch, from a store that it fills where they are missing.

    Args:
        store: with the arrays that the methods read.
        transfer: its teacher runs for images that are not in the store yet.
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
        """The teacher's outputs for images x (B, 3, H, W), given their numbers and their view.

        The values are those of the files, also for images whose outputs were just computed: a run
        that continues reads the same bits.
        """
        assert view is not None, "a store needs fixed views"
        if self.transfer.teacher is None:
            return self.store.read(rows, view, self.fabric.device)
        stored = self.store.read_if_filled(rows, view, self.fabric.device)
        if stored is not None:
            return stored
        # The whole batch, even if most of it is stored: a compiled teacher takes one batch size.
        with self.fabric.autocast():
            computed = self.transfer.run_teacher(x)
        assert computed.logits is not None
        features = dict(zip(self._layers, computed.features, strict=True))
        output = self.store.add(rows, view, computed.logits, features)  # type: ignore[arg-type]
        if self.store.note is not None and not self._has_warned:
            self._has_warned = True
            self.say(f"warning: {self.store.note}: the run goes on without adding to it")
        return output
