"""store.json: the teacher, images, views and arrays of a store; imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import Field, TypeAdapter

from ..cache import cache_folder
from ..data.options import UNUSED_OPTIONS, AugmentOptions
from ..errors import UserError, shown
from ..map_options import MapOptions
from ..options import option_specs
from ..run_folder import write_json
from .options import StoreOptions

FILE = "store.json"
VERSION = 1
LOGITS, CLASSES = "logits", "logits.classes"  # the second only with `top_k`
ITEM_BYTES = {"float16": 2, "float32": 4, "int32": 4}
Views = dict[str, Any]
Size = Annotated[int, Field(ge=1, lt=1 << 48)]


@dataclass(frozen=True)
class TeacherRecord:
    """The teacher of a store; only a store that `teach` filled has `numbers`."""

    name: str
    fingerprint: str  # of its weights and preprocessing
    classes: tuple[str, ...]
    has_class_names: bool = True
    folder: str | None = None  # its run
    weights: str | None = None  # SHA-256 of its file of weights
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def identity(self) -> str:
        """The fingerprint that a run records of its teacher."""
        return self.weights or self.fingerprint


@dataclass(frozen=True)
class ImagesRecord:
    """The training images of a store: all images of the data source."""

    spec: str
    fingerprint: str
    count: Size
    size: tuple[Size, Size] | None = None


@dataclass(frozen=True)
class ArrayEntry:
    """An array (V, N, ...): a row for each image of each view."""

    name: str
    shape: tuple[Size, ...]
    dtype: Literal["float16", "float32", "int32"]
    layer: str | None = None  # of a map
    options: MapOptions | None = None  # of a map

    @property
    def file(self) -> str:
        return f"{quote(self.name, safe='')}.npy"

    @property
    def filled_file(self) -> str:
        """The file that marks the filled rows, with a byte for each row."""
        return f"{quote(self.name, safe='')}.filled.npy"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row and its mark."""
        return math.prod(self.shape[2:]) * ITEM_BYTES[self.dtype] + 1

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.row_bytes


@dataclass(frozen=True)
class StageRecord:
    """A stage of the teacher, with the fields of `taps.Stage`."""

    name: str
    shape: tuple[Size, ...]
    stride: float
    depth: int


@dataclass(frozen=True)
class Header:
    """The content of store.json."""

    teacher: TeacherRecord
    images: ImagesRecord
    views: Views  # the number of views, and the augmentation options
    dtype: Literal["float16", "float32"]
    top_k: Size | None
    stages: tuple[StageRecord, ...]
    arrays: tuple[ArrayEntry, ...]
    version: int = VERSION

    @property
    def view_count(self) -> int:
        return int(self.views["views"])

    @property
    def bytes(self) -> int:
        """The size of the filled store."""
        return sum(entry.bytes for entry in self.arrays)

    @property
    def layers(self) -> list[str]:
        """The layers with a map."""
        return [entry.layer for entry in self.arrays if entry.layer is not None]

    def with_arrays(self, entries: tuple[ArrayEntry, ...]) -> Header:
        """The header with those of `entries` that it does not have yet."""
        names = {entry.name for entry in self.arrays}
        return replace(self, arrays=(*self.arrays, *(e for e in entries if e.name not in names)))

    def key(self) -> str:
        """A short name; two headers with the same key can share a store."""
        # Without the arrays, because runs add those that they need to a shared store.
        identity = [
            *(self.version, self.teacher.fingerprint, self.images.fingerprint, self.images.count),
            *(self.images.size, self.views, self.dtype, self.top_k),
        ]
        text = json.dumps(identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check_same(self, folder: Path, wanted: Header) -> None:
        """Raises `UserError` unless the store in `folder` has the teacher and views of `wanted`."""
        if self.teacher.fingerprint != wanted.teacher.fingerprint:
            raise UserError(
                f"{folder} is the store of another teacher: the weights or the preprocessing of "
                f"{self.teacher.name} differ from those of {wanted.teacher.name}; choose another "
                "folder (--store; for teach --out)"
            )
        self.check_same_images(folder, wanted.images)
        self.check_options(folder, wanted.views, wanted.dtype, wanted.top_k)

    def check_same_images(self, folder: Path, images: ImagesRecord) -> None:
        """Raises `UserError` if the store has other images."""
        if replace(self.images, spec=images.spec) != images:
            raise UserError(
                f"{folder} is a store of other images: "
                f"{_describe(self.images)}, not {_describe(images)}"
            )

    def check_options(self, folder: Path, views: Views, dtype: str, top_k: int | None) -> None:
        """Raises `UserError` if the store was filled with other options."""
        stored = self.views | {"store_dtype": self.dtype, "top_k": self.top_k or "all"}
        wanted = views | {"store_dtype": dtype, "top_k": top_k or "all"}
        for key, value in wanted.items():
            have = _plain(stored.get(key))
            if have != _plain(value):
                raise UserError(
                    f"{folder} is a store of other outputs: "
                    f"{key} is {have} in the store and {_plain(value)} in this command"
                )


def read_header(folder: Path) -> Header:
    """The header of the store in `folder`.

    Raises:
        UserError: if there is none, it is damaged, or of another version.
    """
    file = folder / FILE
    if not file.is_file():
        state = "is no store: it has no store.json" if folder.exists() else "does not exist"
        raise UserError(f"the folder {folder} {state}; name the folder that teach wrote (--out)")
    try:
        content = json.loads(file.read_bytes())
        version = content["version"]
        header = _adapter().validate_python(content) if version == VERSION else None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{file} is damaged: remove the store and fill it again") from None
    if header is None:
        raise UserError(
            f"{file} has version {shown(version)}: this version of the package reads {VERSION}"
        )
    problem = _inconsistency(header)
    if problem is not None:
        raise UserError(f"{file} is damaged: {problem}; remove the store and fill it again")
    return header


def _inconsistency(header: Header) -> str | None:
    """What contradicts itself in a header, such as arrays for another number of images."""
    views, count = header.views.get("views"), header.images.count
    if not isinstance(views, int) or views < 1:
        return f"views is {shown(views)}, expected a whole number ≥ 1"
    classes = len(header.teacher.classes)
    logits = {LOGITS: (classes,)}
    if header.top_k is not None:
        logits = {LOGITS: (header.top_k + 1,), CLASSES: (header.top_k,)}
        if header.top_k >= classes:
            return f"top_k is {header.top_k}, expected less than its {classes} classes"
    names = [entry.name for entry in header.arrays]
    if len(set(names)) < len(names) or not logits.keys() <= set(names):
        return f"its arrays are {', '.join(names)}, expected {', '.join(logits)} and maps"
    for entry in header.arrays:
        expected = (views, count, *logits.get(entry.name, entry.shape[2:]))
        if entry.shape != expected or len(expected) < 3:
            return f"{entry.name} has the shape {entry.shape}, expected {expected}"
        is_map = entry.layer is not None and entry.options is not None
        if is_map == (entry.name in logits) or (entry.dtype == "int32") != (entry.name == CLASSES):
            return f"{entry.name} is neither a map nor of the logits"
        if entry.layer is not None and entry.options is not None:
            name = entry.options.map_name(entry.layer)
            if entry.name != name:
                return f"{entry.name} has the layer and options of {name}"
    return None


def write_header(folder: Path, header: Header) -> None:
    """Writes store.json, whole or not at all."""
    write_json(folder / FILE, dataclasses.asdict(header))


def is_store(path: str | Path | None) -> bool:
    """Whether `path` is the folder of a store."""
    return path is not None and (Path(path) / FILE).is_file()


def check_new(folder: Path) -> None:
    """Raises `UserError` for a folder with other content than a store's."""
    if folder.is_file():
        raise UserError(f"{folder} is a file: a store is a folder, choose another place")
    if folder.is_dir() and not all(_may_be_of_a_store(path) for path in folder.iterdir()):
        raise UserError(
            f"{folder} exists and holds no store: choose another folder (--store; for teach --out)"
        )


def _may_be_of_a_store(path: Path) -> bool:
    """Whether a file may belong to an unfinished store: its header is written last."""
    # Hidden files do not count: a killed process leaves partial ones.
    if path.name[0] == "." or path.name.endswith(".filled.npy"):
        return True
    # An array is written after its marks; an array without marks is a user's own.
    return path.suffix == ".npy" and path.with_suffix(".filled.npy").exists()


def view_options(options: Any) -> Views:
    """The number of views, and the augmentation options that their crops and flips depend on."""
    unused = UNUSED_OPTIONS[options.augment]
    keys = [key for key in option_specs(AugmentOptions) if key not in unused]
    return {key: _plain(getattr(options, key)) for key in keys}


def store_defaults(teacher: str | None) -> dict[str, Any]:
    """The options that a run takes from the store in its teacher's place."""
    if not is_store(teacher):
        return {}
    header = read_header(Path(str(teacher)))
    # No other key of the file becomes an option of the run.
    known = option_specs(AugmentOptions)
    views = {key: value for key, value in header.views.items() if key in known}
    defaults: dict[str, Any] = {"data": header.images.spec, **views}
    defaults |= {"store_dtype": header.dtype, "top_k": header.top_k}
    if header.images.size is not None:
        defaults["image_size"] = header.images.size[0]
    return defaults


def default_folder(header: Header) -> Path:
    """The folder of a store in the cache, named after its teacher, images and views."""
    return cache_folder("stores") / header.key()


def check_store(options: Any, teacher: str | None) -> None:
    """Raises `UserError` for options that differ from the store in the teacher's place."""
    if not is_store(teacher):
        return
    folder = Path(str(teacher))
    header = read_header(folder)
    if options.teacher_weights is not None:
        raise UserError(f"{folder} is a store and has no weights: leave --teacher-weights out")
    header.check_options(folder, view_options(options), options.store_dtype, options.top_k)


def idle_options(options: Any, teacher: str | None, learns: bool) -> dict[str, str]:
    """{option: message} for the store options that would have no effect in a run.

    `learns`: whether the methods of the run can learn from a store.
    """
    if is_store(teacher):
        return {"store": "--store is given, but --teacher is a store itself: leave --store out"}
    if options.views is None:
        reason = "only fixed views are stored: add --views, or leave it out"
    elif not learns:
        reason = f"method {options.method!r} cannot learn from a store: leave it out"
    else:
        return {}
    specs = option_specs(StoreOptions)
    return {key: f"{spec.flags[0]} is given, but {reason}" for key, spec in specs.items()}


@cache
def _adapter() -> TypeAdapter[Header]:
    return TypeAdapter(Header)


def _plain(value: Any) -> Any:
    """The value as JSON returns it: a tuple becomes a list."""
    return list(value) if isinstance(value, tuple) else value


def _describe(images: ImagesRecord) -> str:
    text = f"{images.count} of {images.spec}"
    if images.size is not None:
        text += " at {}×{}".format(*images.size)
    return f"{text} ({images.fingerprint[:8]})"
