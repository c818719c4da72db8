"""`wds:PATTERN`: WebDataset shards. These are tar files; members with the same name are a sample.

For example 0001.jpg and 0001.cls. Once the offsets of its members are known, a tar file has random
access, so nothing is copied. We do not use the builder `webdataset` of Hugging Face's `datasets`:
it copies all shards, takes the label type from the first five samples, and stops at a damaged
shard.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError, first_line
from .decode import Encoded
from .image_folder import EXTENSIONS
from .labels import Labels, class_names
from .options import DataOptions
from .reader import PackedStrings, Reader, file_size
from .shards import find_shards
from .source import Labelled, Source, source_in_files
from .spec import unique_names

LABEL_KEYS = ("cls", "label", "class", "target", "class_name", "label_name")
LABEL_BYTES = 1 << 20  # bytes to read from a label file
LARGEST_LABEL = 10**18


class Sample(NamedTuple):
    """A labelled image: its offset and length in a shard, its name, and its label."""

    shard: int
    offset: int
    length: int
    name: str
    label: int | str


def open_wds(place: str, options: DataOptions) -> Source:
    """Lists the samples of the shards at `place` (see `find_shards`).

    Labels are `.cls` files, or `.json` files with a key like `cls` or `label`. If any label is a
    word, all are read as words, and the classes are in alphabetical order. A file `classes.txt`
    beside the shards names the classes, one per line. Raises `UserError` for missing or damaged
    shards, incomplete samples and labels out of range.
    """
    train_shards, val_shards = find_shards(place)
    train, skipped = read_shards(train_shards, options.on_bad_image)
    use_words = any(isinstance(sample.label, str) for sample in train)
    notes: tuple[str, ...] = ()
    if use_words:
        notes = _mixed_label_notes(train_shards, train)
    labelled = _labelled(train_shards, train, use_words)
    classes = _read_class_names(train_shards[0].parent) or class_names(*labelled)
    val = None
    if val_shards and options.val_split is None:
        val_samples, val_skipped = read_shards(val_shards, options.on_bad_image)
        val = _labelled(val_shards, val_samples, use_words)
        skipped += val_skipped
    return source_in_files(labelled, val, classes, options, skipped=skipped, notes=notes)


def _read_class_names(folder: Path) -> tuple[str, ...]:
    """The lines of classes.txt, () if there is none."""
    file = folder / "classes.txt"
    if not file.is_file():
        return ()
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(
            f"cannot read {file} ({error}): expected UTF-8, one class per line; save it as such"
        ) from error
    names = [line.strip() for line in lines if line.strip()]
    return unique_names(names, [str(label) for label in range(len(names))])


def read_shards(shards: Sequence[Path], on_bad_image: str) -> tuple[list[Sample], int]:
    """All samples in order, and the number of incomplete samples and damaged shards.

    Either is an error unless `on_bad_image` is "skip".
    """
    samples: list[Sample] = []
    skipped = 0
    for number, shard in enumerate(shards):
        for sample in _read_shard(number, shard):
            if isinstance(sample, Sample):
                samples.append(sample)
            elif on_bad_image == "skip":
                skipped += 1
            else:
                raise UserError(f"{sample}, or leave it out with --on-bad-image skip")
    if not samples:
        raise UserError(
            f"{shards[0]} has no samples: expected members like 0001.jpg and 0001.cls; "
            "check the shards"
        )
    return samples, skipped


def _read_shard(number: int, shard: Path) -> Iterator[Sample | str]:
    """The samples of a shard, and an error text for each incomplete or damaged one."""
    try:
        for name, images, label_files in _grouped_members(shard):
            label = _parse_label(label_files)
            if isinstance(label, int) and abs(label) > LARGEST_LABEL:
                yield (
                    f"{shard}, sample {name}, has a label of more than 18 digits: expected the "
                    "number of a class, counted from 0; correct it"
                )
            elif images and label is not None:
                yield Sample(number, *images[0], name, label)
            elif images:
                yield (
                    f"{shard}, sample {name}, has no label (.cls, or .json with cls or label): "
                    "expected it next to the image; correct it"
                )
            elif label_files:  # a member with neither image nor label is metadata
                yield (
                    f"{shard}, sample {name}, has no image: expected it next to the label; "
                    "correct it"
                )
    except (tarfile.TarError, OSError, EOFError) as error:
        yield (
            f"cannot read the shard {shard} ({first_line(error)}): expected a whole tar file, "
            "not compressed; fetch it again"
        )


def _grouped_members(shard: Path) -> Iterator[tuple[str, list[tuple[int, int]], dict[str, bytes]]]:
    """Name, images as (offset, length) in bytes, and label files by extension of each sample."""
    # "r:" refuses compressed files, in which offsets are useless.
    shard_bytes = shard.stat().st_size
    with tarfile.open(shard, "r:") as tar:
        name: str | None = None
        images: list[tuple[int, int]] = []
        labels: dict[str, bytes] = {}
        for member in tar:
            # The content of a sparse member is not at its offset.
            if member.issparse():
                raise tarfile.ReadError(f"its member {member.name} is sparse")
            # macOS adds hidden members such as ._0001.jpg.
            if not member.isfile() or Path(member.name).name.startswith("."):
                continue
            # The name of a sample ends at the first dot of the file name, folders excluded.
            folder, slash, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            extension = extension.lower()
            if folder + slash + stem != name:
                if name is not None:
                    yield name, images, labels
                name, images, labels = folder + slash + stem, [], {}
            # A damaged size could be far more than fits into memory.
            if member.offset_data + member.size > shard_bytes:
                raise tarfile.ReadError(f"its member {member.name} is cut off")
            if f".{extension.rpartition('.')[2]}" in EXTENSIONS:
                images.append((member.offset_data, member.size))
            elif extension in ("cls", "json"):
                content = tar.extractfile(member)
                assert content is not None, "only links and folders have no content"
                labels[extension] = content.read(LABEL_BYTES)
        # tarfile does not notice a shard that is cut off between two members.
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"it is damaged or cut off at byte {tar.offset:,}")
        if name is not None:
            yield name, images, labels


def _parse_label(files: dict[str, bytes]) -> int | str | None:
    """A number, a word, or None if there is no label."""
    value: Any = None
    if "cls" in files:
        value = files["cls"].decode("utf-8", "replace").strip()
    elif "json" in files:
        try:
            value = json.loads(files["json"])
        except (ValueError, RecursionError):
            return None
        if isinstance(value, dict):
            value = next((value[key] for key in LABEL_KEYS if key in value), None)
    if isinstance(value, str) and not re.fullmatch(r"-?\d+", value):
        return value or None
    if isinstance(value, str):
        # Cut off, because `int` refuses very long numbers. The result is out of range anyway.
        return int(value[:30])
    if isinstance(value, int):
        return int(value)
    return None


def _mixed_label_notes(shards: Sequence[Path], samples: Sequence[Sample]) -> tuple[str, ...]:
    """A warning if some labels are words and others numbers, which is rarely intended."""
    words = [sample for sample in samples if isinstance(sample.label, str)]
    if len(words) == len(samples):
        return ()
    first = words[0]
    return (
        f"warning: {len(words):,} of {len(samples):,} labels are not whole numbers "
        f"({first.label!r} of {shards[first.shard]}, sample {first.name}): all are read as words",
    )


def _labelled(shards: Sequence[Path], samples: Sequence[Sample], use_words: bool) -> Labelled:
    """A reader of the samples, and their labels: all words, or all numbers."""
    labels: Labels
    if use_words:
        labels = [str(sample.label) for sample in samples]
    else:
        for sample in samples:
            if isinstance(sample.label, str):
                raise UserError(
                    f"{shards[sample.shard]}, sample {sample.name}: the label {sample.label!r} is "
                    "a word, but the training labels are numbers; correct it"
                )
        labels = np.array([sample.label for sample in samples], dtype=np.int64)
    return TarReader(shards, samples), labels


class TarReader(Reader):
    """Images at their offsets in tar files."""

    def __init__(self, shards: Sequence[Path], samples: Sequence[Sample]) -> None:
        self.shards = tuple(shards)
        self._places = np.array([sample[:3] for sample in samples], dtype=np.int64)
        self._names = PackedStrings([sample.name for sample in samples])

    def __len__(self) -> int:
        return len(self._places)

    def encoded(self, i: int) -> Encoded:
        shard, offset, length = self._places[i].tolist()
        # Opened each time, because there may be more shards than a process may keep open; without
        # a buffer, because there is only one read.
        with open(self.shards[shard], "rb", buffering=0) as file:
            file.seek(offset)
            return file.read(length)

    def fingerprint_parts(self) -> Iterator[bytes]:
        for shard in self.shards:
            yield os.fsencode(shard.name)
            yield file_size(shard)
        yield self._places.tobytes()
        for name in self._names:
            yield os.fsencode(name)

    def file(self, i: int) -> str:
        return f"{self.shards[self._places[i, 0]].name}:{self._names[i]}"

    def location(self, i: int) -> str:
        return f"{self.shards[self._places[i, 0]]}, sample {self._names[i]}"
