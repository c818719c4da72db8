"""Fingerprints of data, by which a continued run and a store detect that the images changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path

import numpy as np

from .images import ImageSet
from .reader import Reader
from .source import Images, Source

# The beginnings of some files are read, because uncompressed images all have the same file size.
SAMPLED_IMAGES = 64
SAMPLE_BYTES = 1 << 16  # per image


@dataclass(frozen=True)
class DataRecord:
    """What identifies the images of a data spec, before any are selected."""

    classes: int
    images: int  # for training
    fingerprint: str  # of the training images
    val_fingerprint: str | None  # None if validation images are cut from the training images


def data_record(source: Source, size: int) -> DataRecord:
    """The record of images that are used at `size` x `size`."""
    val = None
    if source.val is not None:
        val = fingerprint(source.val, size)
    train = source.train
    return DataRecord(len(train.classes), train.source_size, fingerprint(train, size), val)


def fingerprint(images: Images, size: int) -> str:
    """16 hexadecimal digits that identify the images and labels of a source at `size` x `size`.

    For images in memory, the pixels are hashed. For images in files, the names and sizes of all
    files are hashed, and the beginnings of 64 files.
    """
    digest = sha256()
    # The images are hashed before they are resized, so their later size is hashed as well.
    header = [len(images), images.classes, size]
    beginning = (json.dumps(header).encode(), images.labels.numpy().tobytes())
    for part in chain(beginning, _parts(images)):
        # The length of each part is hashed as well: different lists of parts give different hashes.
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return digest.hexdigest()[:16]


def _parts(images: Images) -> Iterator[bytes | memoryview]:
    if isinstance(images, ImageSet):
        yield images.images.numpy().reshape(-1).data
        return
    yield from images.reader.fingerprint_parts()
    sampled = np.linspace(0, len(images) - 1, SAMPLED_IMAGES, dtype=np.int64)
    for i in np.unique(sampled).tolist():
        yield _beginning(images.reader, i)


def _beginning(reader: Reader, i: int) -> bytes:
    """The first bytes of an encoded image; empty if it cannot be read."""
    try:
        encoded = reader.encoded(i)
        if isinstance(encoded, Path):
            with open(encoded, "rb") as file:
                return file.read(SAMPLE_BYTES)
    except (OSError, ValueError):  # ValueError: an invalid path
        # No error: an unreadable image is reported, or skipped, when it is decoded.
        return b""
    return (encoded or b"")[:SAMPLE_BYTES]
