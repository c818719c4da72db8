"""`TeacherStore`: a teacher's outputs for views of images, read from files and added to them."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arguments import check_path
from ..errors import RunError, UserError
from ..map_options import MapOptions
from ..maps import as_grid, attention_map
from ..numerics import at_least_float32, check_logits
from ..run_folder import remove_partial_files
from ..taps import Stage
from ..teacher import TeacherOutput
from . import top_k
from .arrays import Rows, StoredArray, Values, locked
from .header import CLASSES, LOGITS, Header, check_new, is_store, read_header, write_header


class TeacherStore:
    """A folder of a teacher's outputs: `TeacherStore(folder)` opens one.

    Images are identified by their number (row) in the training images and their view. `read`
    returns what `Transfer` takes as `teacher=`; `add` stores the teacher's outputs for images that
    the store does not have yet. Several processes may read and add at the same time.

    Attributes:
        header: the teacher, images and views.
        note: the reason why writing stopped, such as a full disk; else None.

    Raises:
        UserError: (a ValueError) for a folder that is not a store, or is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        check_path(folder, "folder")
        self.folder = Path(folder)
        self.header = read_header(self.folder)
        self.note: str | None = None
        self._arrays: list[StoredArray] = []
        self._use([entry.name for entry in self.header.arrays])
        for array in self._arrays:
            array.check()

    @classmethod
    def create(cls, folder: str | os.PathLike[str], header: Header) -> TeacherStore:
        """Creates the store in `folder`; an existing store gets the arrays that it lacks.

        Raises:
            UserError: for a folder with other content, or one that cannot be written.
        """
        path = Path(folder)
        if is_store(path):
            present = read_header(path)
            present.check_same(path, header)
            if present.with_arrays(header.arrays) == present:
                return cls(path)  # a complete store may be read-only
        else:
            check_new(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            with locked(path):
                remove_partial_files(path)
                # Another process may have created it in the meantime.
                present = replace(header, arrays=())
                if is_store(path):
                    present = read_header(path)
                    present.check_same(path, header)
                complete = present.with_arrays(header.arrays)
                for entry in complete.arrays[len(present.arrays) :]:
                    StoredArray.create(path, entry)
                # The header comes last, so that it names only arrays that exist.
                write_header(path, complete)
        except OSError as error:
            raise UserError(
                f"cannot write the store {path} ({error.strerror}): "
                "choose another folder (--store; for teach --out)"
            ) from error
        return cls(path)

    def stages(self, options: MapOptions) -> list[Stage]:
        """The teacher's stages whose maps under these options are in the store.

        Raises:
            UserError: if there are none.
        """
        names = {entry.name for entry in self.header.arrays}
        stages = []
        for record in self.header.stages:
            if options.map_name(record.name) in names:
                stages.append(Stage(record.name, record.shape, record.stride, record.depth))
        if not stages:
            raise self._has_no(options.map_name("LAYER"))
        return stages

    def select(self, layers: Sequence[str], options: MapOptions | None) -> TeacherStore:
        """The same store; `read` then returns only the logits and the maps of these layers.

        Raises:
            UserError: if the store does not have a map.
        """
        names = []
        if options is not None:
            names = [options.map_name(layer) for layer in dict.fromkeys(layers)]
        present = {entry.name for entry in self.header.arrays}
        for name in names:
            if name not in present:
                raise self._has_no(name)
        # Not the constructor, which would read and check the files again.
        selected = copy.copy(self)
        logits = [entry.name for entry in self.header.arrays if entry.layer is None]
        selected._use([*logits, *names])
        return selected

    def _has_no(self, name: str) -> UserError:
        present = [entry.name for entry in self.header.arrays if entry.layer is not None]
        return UserError(
            f"{self.folder} has the maps {', '.join(present) or 'of no layer'}: "
            f"expected {name} (layer, kind and p); a run with the teacher's network can add it"
        )

    def has(self, rows: Tensor, view: int = 0) -> bool:
        """Whether `read` has all outputs for these images."""
        return bool(self.filled(rows, view).all())

    def filled(self, rows: Tensor, view: int = 0) -> Tensor:
        """For each image, whether `read` has all outputs: bool (B,)."""
        index = self._index(rows, view)
        filled = np.ones(len(index), np.bool_)
        for array in self._arrays:
            filled &= array.filled(view, index)
        return torch.from_numpy(filled)

    def count_missing(self, rows: Tensor, views: Sequence[int]) -> int:
        """Number of pairs (image, view) for which an output is missing."""
        return sum(int((~self.filled(rows, view)).sum()) for view in views)

    def read(
        self, rows: Tensor, view: int = 0, device: torch.device | str = "cpu"
    ) -> TeacherOutput:
        """The teacher's outputs for one view of some images, in float32 on `device`.

        Args:
            rows: int64 (B,), the numbers of the images.
            view: the number of the view.

        Raises:
            UserError: for numbers that are out of range, and for images without outputs.
        """
        output = self.read_if_filled(rows, view, device)
        if output is None:
            missing = torch.as_tensor(rows)[~self.filled(rows, view)]
            raise UserError(
                f"{self.folder} has no row {missing[0]} of view {view} ({len(missing)} of "
                f"{len(rows)} are missing): fill it (attention-transfer teach), or add them"
            )
        return output

    def read_if_filled(
        self, rows: Tensor, view: int = 0, device: torch.device | str = "cpu"
    ) -> TeacherOutput | None:
        """As `read`, but None if an output is missing."""
        if not self.has(rows, view):
            return None
        return self._output(self._gather(self._index(rows, view), view), device)

    def add(
        self,
        rows: Tensor,
        view: int,
        logits: Tensor,
        features: Mapping[str, Tensor],
    ) -> TeacherOutput:
        """Stores the teacher's outputs for those images that the store does not have yet.

        Returns the stored outputs for all images of the batch, in the precision of the store. If
        the store cannot be written to, `note` gives the reason, and the outputs that are not in
        the store come from the arguments.

        Args:
            rows: int64 (B,), the numbers of the images.
            view: the number of the view.
            logits: (B, K).
            features: {layer: features (B, C, H, W) or (B, L, D)} of the layers whose maps are
                stored, or {layer: attention (B, heads, H, W)} for maps of attention.

        Raises:
            UserError: for numbers that are out of range and for wrong shapes.
            RunError: for values that are not finite.
        """
        index = self._index(rows, view)
        encoded = self._encode(logits, features)
        for array, values in zip(self._arrays, encoded, strict=True):
            expected = (len(index), *array.row_shape)
            if values.shape != expected:
                raise UserError(
                    f"{array.entry.name} of the teacher is {values.shape}: expected {expected}"
                )
            if not np.isfinite(values).all():
                raise RunError(f"the teacher's {array.entry.name} is not finite in view {view}")
        if self.note is None:
            try:
                self._write(index, view, encoded)
            except OSError as error:
                self.note = f"{self.folder} cannot be written ({error.strerror})"
        parts = self._gather(index, view)
        for array, part, values in zip(self._arrays, parts, encoded, strict=True):
            absent = ~array.filled(view, index)
            part[absent] = values[absent]
        return self._output(parts, logits.device)

    def sample(self, count: int, device: torch.device | str = "cpu") -> TeacherOutput:
        """The outputs for `count` evenly spaced images of view 0 that have outputs.

        If no image has outputs, the logits are 0 and the maps are uniform.
        """
        rows = self.filled(torch.arange(self.header.images.count)).nonzero().flatten()
        if len(rows):
            return self.read(rows[torch.linspace(0, len(rows) - 1, count).long()], device=device)
        maps = {}
        for array in self._arrays:
            if array.entry.layer is not None:
                maps[array.entry.name] = torch.ones(count, *array.row_shape, device=device)
        return TeacherOutput(torch.zeros(count, self.classes, device=device), maps=maps)

    @property
    def classes(self) -> int:
        """Number of classes of the logits."""
        return len(self.header.teacher.classes)

    @property
    def layers(self) -> list[str]:
        """The layers whose maps `read` returns."""
        return [array.entry.layer for array in self._arrays if array.entry.layer is not None]

    @property
    def reads_attention(self) -> bool:
        """Whether the maps that `read` returns come from the layers' attention."""
        all_options = [array.entry.options for array in self._arrays]
        return any(options is not None and options.reads_attention for options in all_options)

    def record(self, numbers: Mapping[str, float]) -> None:
        """Writes numbers of the teacher, such as its validation accuracy, into store.json."""
        with locked(self.folder):
            header = read_header(self.folder)
            teacher = replace(header.teacher, numbers=header.teacher.numbers | dict(numbers))
            write_header(self.folder, replace(header, teacher=teacher))
        self.header = read_header(self.folder)

    def _use(self, names: Sequence[str]) -> None:
        """Selects these arrays, and keeps open those that are open already."""
        opened = {array.entry.name: array for array in self._arrays}
        entries = {entry.name: entry for entry in self.header.arrays}
        self._arrays = [
            opened.get(name) or StoredArray(self.folder, entries[name]) for name in names
        ]

    def _index(self, rows: Tensor, view: int) -> Rows:
        """The rows as a NumPy array, which would take a negative number from the end."""
        index: Rows = torch.as_tensor(rows).cpu().numpy().astype(np.int64, copy=False)
        count, views = self.header.images.count, self.header.view_count
        if not 0 <= view < views:
            raise UserError(f"view is {view}: {self.folder} has views 0 to {views - 1}")
        if index.ndim != 1 or not len(index) or index.min() < 0 or index.max() >= count:
            raise UserError(f"rows are {rows}: expected numbers (B,) from 0 to {count - 1}")
        return index

    def _gather(self, index: Rows, view: int) -> list[Values]:
        """The rows of each array (B, ...)."""
        parts = [array.take(view, index) for array in self._arrays]
        for array, part in zip(self._arrays, parts, strict=True):
            if array.entry.name == CLASSES and (part.min() < 0 or part.max() >= self.classes):
                raise UserError(
                    f"{self.folder / array.entry.file} is damaged: it has classes beyond the "
                    f"{self.classes} of the teacher; remove the store and fill it again"
                )
        return parts

    def _output(self, parts: Sequence[Values], device: torch.device | str) -> TeacherOutput:
        tensors = {}
        for array, part in zip(self._arrays, parts, strict=True):
            tensors[array.entry.name] = _to_device(part, device)
        logits = tensors.pop(LOGITS, None)
        if (classes := tensors.pop(CLASSES, None)) is not None and logits is not None:
            logits = top_k.decode(logits, classes, self.classes)
        return TeacherOutput(logits, maps=tensors)

    @torch.no_grad()
    def _encode(self, logits: Tensor, features: Mapping[str, Tensor]) -> list[Values]:
        """The rows of each array, as they are stored."""
        values = {LOGITS: at_least_float32(check_logits(logits, "the teacher"))}
        if not logits.isfinite().all():  # before `clamp` makes infinite values finite
            raise RunError("the teacher's logits are not finite")
        if self.header.top_k is not None:
            values[LOGITS], values[CLASSES] = top_k.encode(logits, self.header.top_k)
        # Larger logits would be infinite in float16.
        largest = float(np.finfo(self.header.dtype).max)
        values[LOGITS] = values[LOGITS].clamp(-largest, largest)
        rows = []
        for array in self._arrays:
            entry = array.entry
            if entry.layer is not None and entry.options is not None:
                if entry.layer not in features:
                    raise UserError(
                        f"features has the layers {', '.join(features)}: expected {entry.layer} "
                        f"as well, whose map is stored in {self.folder}"
                    )
                values[entry.name] = normalized_map(features[entry.layer], entry.options)
            tensor = values[entry.name].to(getattr(torch, entry.dtype))
            rows.append(tensor.cpu().numpy())
        return rows

    def _write(self, index: Rows, view: int, encoded: Sequence[Values]) -> None:
        # An image may occur twice in a batch: a readable image replaces an unreadable one.
        rows, first = np.unique(index, return_index=True)
        with locked(self.folder):
            for array, values in zip(self._arrays, encoded, strict=True):
                absent = ~array.filled(view, rows)
                if absent.any():
                    array.write(view, rows[absent], values[first[absent]])


def normalized_map(features: Tensor, options: MapOptions) -> Tensor:
    """The map of features as it is stored: (N, H, W), or (N, C) over channels."""
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        values = attention_map(features, options.kind, options.p, axis=options.axis)
    if options.axis == "space":
        values = values.unflatten(1, as_grid(features).shape[2:])
    return values


def _to_device(values: NDArray[Any], device: torch.device | str) -> Tensor:
    """The values as a tensor on `device`: float32 or int64."""
    tensor = torch.from_numpy(values)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    tensor = tensor.to(device, non_blocking=True)
    return tensor.float() if tensor.is_floating_point() else tensor.long()
