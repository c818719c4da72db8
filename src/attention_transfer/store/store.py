"""`TeacherStore`: a teacher's outputs for views of images, read from files or added to them."""

from __future__ import annotations

import math
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
from ..taps import Stage
from ..teacher import TeacherOutput
from . import top_k
from .arrays import Rows, StoredArray, Values, locked
from .header import Header, is_store, read_header, write_header

LOGITS, CLASSES = "logits", "logits.classes"


class TeacherStore:
    """A folder of a teacher's outputs: `TeacherStore(folder)` opens it.

    An image is named by its number (its row) in the training images, and by its view. `read` gives
    what `Transfer` takes as `teacher=`; `add` keeps the teacher's outputs for images that are not
    there yet. Several processes may read and add at the same time.

    Attributes:
        header: the teacher, images and views.
        note: why nothing more is written, such as a full disk; None while all is well.

    Raises:
        UserError: (a ValueError) for a folder that is no store, or a damaged one.
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
        """The store in `folder`; it is made, or gets the arrays of the header that it lacks.

        Raises:
            UserError: for a folder that holds something else, or cannot be written.
        """
        path = Path(folder)
        if is_store(path):
            present = read_header(path)
            present.check_same(path, header)
            if present.with_arrays(header.arrays) == present:
                return cls(path)  # a full store may be one that nobody may write to
        else:
            _check_new(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            with locked(path):
                # Another process may have made it meanwhile.
                present = replace(header, arrays=())
                if is_store(path):
                    present = read_header(path)
                    present.check_same(path, header)
                complete = present.with_arrays(header.arrays)
                for entry in complete.arrays[len(present.arrays) :]:
                    StoredArray.create(path, entry)
                write_header(path, complete)
        except OSError as error:
            raise UserError(
                f"cannot write the store {path} ({error.strerror}): choose another place (--store)"
            ) from error
        return cls(path)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy opens the files itself: those of a memory map would be copied into memory.
        return _reopen, (self.folder, [array.entry.name for array in self._arrays])

    def stages(self, options: MapOptions) -> list[Stage]:
        """The teacher's stages whose maps under these options are there.

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
        """The same store, of which `read` gives the logits and the maps of these layers only.

        Raises:
            UserError: if a map is not there.
        """
        names = []
        if options is not None:
            names = [options.map_name(layer) for layer in dict.fromkeys(layers)]
        present = {entry.name for entry in self.header.arrays}
        for name in names:
            if name not in present:
                raise self._has_no(name)
        selected = TeacherStore.__new__(TeacherStore)
        selected.__dict__.update(self.__dict__)
        selected._use([*self._logit_names(), *names])
        return selected

    def _has_no(self, name: str) -> UserError:
        present = [entry.name for entry in self.header.arrays if entry.layer is not None]
        return UserError(
            f"{self.folder} has the maps {', '.join(present) or 'of no layer'}: "
            f"expected {name} (layer, kind and p); the teacher itself could add it"
        )

    def has(self, rows: Tensor, view: int = 0) -> bool:
        """Whether all that `read` would give of these images is there."""
        return bool(self.filled(rows, view).all())

    def filled(self, rows: Tensor, view: int = 0) -> Tensor:
        """Of each image, whether all that `read` would give is there: bool (B,)."""
        index = self._index(rows, view)
        filled = np.ones(len(index), np.bool_)
        for array in self._arrays:
            filled &= array.filled(view, index)
        return torch.from_numpy(filled)

    def has_all(self, rows: Tensor, views: Sequence[int]) -> bool:
        """As `has`, for several views."""
        return all(self.has(rows, view) for view in views)

    def count_missing(self, rows: Tensor, views: Sequence[int]) -> int:
        """Number of pairs (image, view) of which something is not there."""
        return sum(int((~self.filled(rows, view)).sum()) for view in views)

    def read(
        self, rows: Tensor, view: int = 0, device: torch.device | str = "cpu"
    ) -> TeacherOutput:
        """The teacher's outputs for one view of some images, in float32 on `device`.

        Args:
            rows: int64 (B,), the numbers of the images.
            view: the number of the view.

        Raises:
            UserError: for numbers outside of the store, and for images that are not there.
        """
        index, filled = self._index(rows, view), self.filled(rows, view).numpy()
        if not filled.all():
            missing = index[~filled]
            raise UserError(
                f"{self.folder} has no row {missing[0]} of view {view} ({len(missing)} of "
                f"{len(index)} are missing): fill it (attention-transfer teach), or add them"
            )
        return self._output(*self._gather(index, view), device)

    def add(
        self,
        rows: Tensor,
        view: int,
        logits: Tensor,
        features: Mapping[str, Tensor],
    ) -> TeacherOutput:
        """Keeps the teacher's outputs for images that the store does not have completely.

        Returns the stored outputs for all of them, whoever added them, in the precision of the
        store. If it cannot be written to, `note` says why and the values come from the arguments.

        Args:
            rows: int64 (B,), the numbers of the images.
            view: the number of the view.
            logits: (B, K).
            features: {layer: features (B, C, H, W) or (B, L, D)} of the layers whose maps are kept;
                attention (B, heads, H, W) where the maps are of attention.

        Raises:
            UserError: for numbers outside of the store and for other shapes.
            RunError: for values that are not finite.
        """
        index = self._index(rows, view)
        said = self._encode(logits, features)
        for array, values in zip(self._arrays, said, strict=True):
            expected = (len(index), *array.row_shape)
            if values.shape != expected:
                raise UserError(
                    f"{array.entry.name} of the teacher is {values.shape}: expected {expected}"
                )
            if not np.isfinite(values).all():
                raise RunError(f"the teacher's {array.entry.name} is not finite in view {view}")
        if self.note is None:
            try:
                self._write(index, view, said)
            except OSError as error:
                self.note = f"{self.folder} cannot be written ({error.strerror})"
        parts, flat = self._gather(index, view)
        for array, part, values in zip(self._arrays, parts, said, strict=True):
            absent = ~array.filled(view, index)
            part[absent] = values[absent]
        return self._output(parts, flat, logits.device)

    def sample(self, count: int) -> TeacherOutput:
        """What `read` gives for `count` images of view 0, of those that are there, evenly spaced.

        Where none is there, it has the right shape: logits 0, even maps.
        """
        there = self.filled(torch.arange(self.header.images.count)).nonzero().flatten()
        if len(there):
            return self.read(there[torch.linspace(0, len(there) - 1, count).long()])
        maps = {}
        for array in self._arrays:
            if array.entry.layer is not None:
                maps[array.entry.name] = torch.ones(count, *array.row_shape)
        return TeacherOutput(torch.zeros(count, self.classes), maps=maps)

    @property
    def classes(self) -> int:
        """Number of classes of the logits."""
        return len(self.header.teacher.classes)

    @property
    def layers(self) -> list[str]:
        """The layers whose maps `read` gives."""
        return [array.entry.layer for array in self._arrays if array.entry.layer is not None]

    @property
    def reads_attention(self) -> bool:
        """Whether the maps that `read` gives are of the layers' attention."""
        kept = [array.entry.options for array in self._arrays]
        return any(options is not None and options.reads_attention for options in kept)

    def record(self, numbers: Mapping[str, float]) -> None:
        """Keeps numbers on the teacher, such as its validation accuracy, in store.json."""
        with locked(self.folder):
            header = read_header(self.folder)
            teacher = replace(header.teacher, numbers=header.teacher.numbers | dict(numbers))
            write_header(self.folder, replace(header, teacher=teacher))
        self.header = read_header(self.folder)

    def _logit_names(self) -> list[str]:
        return [entry.name for entry in self.header.arrays if entry.layer is None]

    def _use(self, names: Sequence[str]) -> None:
        """Takes these arrays; those that are open already stay so."""
        opened = {array.entry.name: array for array in self._arrays}
        entries = {entry.name: entry for entry in self.header.arrays}
        self._arrays = [
            opened.get(name) or StoredArray(self.folder, entries[name]) for name in names
        ]

    def _index(self, rows: Tensor, view: int) -> Rows:
        """The rows for numpy, which reads what lies behind an array without a word."""
        index: Rows = torch.as_tensor(rows).cpu().numpy().astype(np.int64, copy=False)
        count, views = self.header.images.count, self.header.view_count
        if not 0 <= view < views:
            raise UserError(f"view is {view}: {self.folder} has views 0 to {views - 1}")
        if index.ndim != 1 or not len(index) or index.min() < 0 or index.max() >= count:
            raise UserError(f"rows are {rows}: expected numbers (B,) from 0 to {count - 1}")
        return index

    def _gather(self, index: Rows, view: int) -> tuple[list[Values], dict[str, NDArray[Any]]]:
        """The rows of each array (B, ...), which lie side by side in one array a type."""
        sizes: dict[str, int] = {}
        for array in self._arrays:
            size = len(index) * math.prod(array.row_shape)
            sizes[array.entry.dtype] = sizes.get(array.entry.dtype, 0) + size
        # In one piece, so that a batch is one copy to the device.
        flat = {dtype: np.empty(size, dtype) for dtype, size in sizes.items()}
        ends = dict.fromkeys(flat, 0)
        parts: list[Values] = []
        for array in self._arrays:
            dtype = array.entry.dtype
            shape = (len(index), *array.row_shape)
            start, ends[dtype] = ends[dtype], ends[dtype] + math.prod(shape)
            part = flat[dtype][start : ends[dtype]].reshape(shape)
            array.take(view, index, part)
            parts.append(part)
        return parts, flat

    def _output(
        self, parts: Sequence[Values], flat: Mapping[str, NDArray[Any]], device: torch.device | str
    ) -> TeacherOutput:
        on_device = {dtype: _to_device(values, device) for dtype, values in flat.items()}
        ends = dict.fromkeys(flat, 0)
        tensors: dict[str, Tensor] = {}
        for array, part in zip(self._arrays, parts, strict=True):
            dtype = array.entry.dtype
            start, ends[dtype] = ends[dtype], ends[dtype] + part.size
            tensors[array.entry.name] = on_device[dtype][start : ends[dtype]].view(part.shape)
        logits = tensors.pop(LOGITS, None)
        if (classes := tensors.pop(CLASSES, None)) is not None and logits is not None:
            logits = top_k.decode(logits, classes, self.classes)
        return TeacherOutput(logits, maps=tensors)

    @torch.no_grad()
    def _encode(self, logits: Tensor, features: Mapping[str, Tensor]) -> list[Values]:
        """The rows of each array, as they are kept."""
        values = {LOGITS: at_least_float32(check_logits(logits, "the teacher"))}
        if not logits.isfinite().all():  # before they are brought into the range of float16
            raise RunError("the teacher's logits are not finite")
        if self.header.top_k is not None:
            values[LOGITS], values[CLASSES] = top_k.encode(logits, self.header.top_k)
        largest = float(np.finfo(self.header.dtype).max)
        values[LOGITS] = values[LOGITS].clamp(-largest, largest)
        rows = []
        for array in self._arrays:
            entry = array.entry
            if entry.layer is not None and entry.options is not None:
                if entry.layer not in features:
                    raise UserError(
                        f"features are of {', '.join(features)}: expected those of {entry.layer} "
                        f"too, whose map {self.folder} keeps"
                    )
                values[entry.name] = normalized_map(features[entry.layer], entry.options)
            tensor = values[entry.name].to(getattr(torch, entry.dtype))
            rows.append(tensor.cpu().numpy())
        return rows

    def _write(self, index: Rows, view: int, said: Sequence[Values]) -> None:
        # An image may stand twice in a batch: a readable one takes the place of an unreadable one.
        rows, first = np.unique(index, return_index=True)
        with locked(self.folder):
            for array, values in zip(self._arrays, said, strict=True):
                absent = ~array.filled(view, rows)
                if absent.any():
                    array.write(view, rows[absent], values[first[absent]])


def normalized_map(features: Tensor, options: MapOptions) -> Tensor:
    """The map of features as a store keeps it: (N, H, W), or (N, C) over channels."""
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        values = attention_map(features, options.kind, options.p, axis=options.axis)
    if options.axis == "space":
        values = values.unflatten(1, as_grid(features).shape[2:])
    return values


def _to_device(values: NDArray[Any], device: torch.device | str) -> Tensor:
    """Floats as float32, whole numbers as int64."""
    tensor = torch.from_numpy(values)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    tensor = tensor.to(device, non_blocking=True)
    return tensor.float() if tensor.is_floating_point() else tensor.long()


def _check_new(folder: Path) -> None:
    """Raises `UserError` for a folder with other things in it."""
    if folder.is_file():
        raise UserError(f"{folder} is a file: a store is a folder, choose another place")
    # Hidden files do not count: a killed process leaves partial ones.
    if folder.is_dir() and any(
        path.name[0] != "." and path.suffix != ".npy" for path in folder.iterdir()
    ):
        raise UserError(f"{folder} exists and holds no store: choose another place (--store)")


def _reopen(folder: Path, names: list[str]) -> TeacherStore:
    store = TeacherStore(folder)
    store._use(names)
    return store
