"""`wds:PATTERN`: WebDataset shards, tar files in which the members of one name make a sample (0001.jpg, 0001.cls)."""

from __future__ import annotations

import glob
import json
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..run_folder import replacing
from .cifar import cache_folder
from .decode import Encoded
from .image_folder import EXTENSIONS, VAL_FOLDERS
from .labels import Labels, class_names, numbered
from .reader import Packed, Reader
from .source import Source, Split
from .spec import distinct, nearest_path
from .stream import StreamSet

IMAGES = frozenset(extension[1:] for extension in EXTENSIONS)
LABEL_KEYS = ("cls", "label", "class", "target", "class_name", "label_name")
EXPECTED = "expected a folder with train-*.tar, or a pattern like shards/{train,val}-{000..099}.tar"


@dataclass
class Samples:
    """What a list of shards holds: where each image is in its shard, its name, and its label (a number or a word)."""

    shards: list[Path]
    shard: list[int] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    length: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    labels: list[int | str] = field(default_factory=list)
    skipped: int = 0


def open_wds(place: str, image_size: int | None, on_bad_image: str, want_val: bool) -> Source:
    """Lists the shards' samples; images are then read at their place in the shard, in any order.

    `place` is a folder (train*.tar, and val*, valid*, validation* or test*.tar), or a pattern with {a,b}, {000..099},
    * and ?; of a brace with `train` in it, the other words are the validation set. Shards at a URL are fetched once.
    Labels are `.cls` or a `.json` with `cls` or `label`; words become classes in alphabetical order. A file
    `classes.txt` beside the shards, one a line, names the classes. Raises `UserError` for whatever is wrong.
    """
    train_shards, val_shards = find_shards(place)
    train = read_shards(train_shards, on_bad_image)
    words = any(isinstance(label, str) for label in train.labels)
    notes = _mixed(train) if words else ()
    labels = _labels(train, words)
    classes = _named_classes(train_shards[0].parent) or class_names(labels)
    reader = TarReader(train)
    numbers = numbered(reader, labels, classes)
    made = StreamSet.whole(
        reader, numbers, classes, image_size or reader.usual_size(), on_bad_image
    )
    if not want_val or not val_shards:
        return Source(
            classes, made.size, Split.read(made), None, skipped=train.skipped, notes=notes
        )
    val = read_shards(val_shards, on_bad_image)
    reader = TarReader(val)
    numbers = numbered(reader, _labels(val, words), classes)
    held = StreamSet.whole(reader, numbers, classes, made.size, on_bad_image)
    skipped = train.skipped + val.skipped
    return Source(
        classes, made.size, Split.read(made), Split.read(held), skipped=skipped, notes=notes
    )


def find_shards(place: str) -> tuple[list[Path], list[Path]]:
    """The training and the validation shards, sorted; URLs are fetched into a cache folder."""
    if place.startswith(("http://", "https://")):
        train, val = ([_fetched(url) for url in expand(pattern)] for pattern in _parts(place))
        return train, val
    if "://" in place or place.startswith("pipe:"):
        raise UserError(f"wds:{place}: expected files or http(s):// shards; fetch them first")
    folder = Path(place).expanduser()
    if folder.is_dir():
        train = sorted(folder.glob("*train*.tar"))
        val = next(
            (found for name in VAL_FOLDERS if (found := sorted(folder.glob(f"*{name}*.tar")))), []
        )
    else:
        train, val = (_matching(pattern) for pattern in _parts(str(folder)))
    if not train:
        packed = folder.is_dir() and any(folder.glob("*.tar.*"))
        state = "holds compressed shards only" if packed else "names no shard that exists"
        raise UserError(
            f"wds:{place} {state}: {EXPECTED}; {'unpack them to .tar' if packed else 'check it'}"
        )
    return train, [shard for shard in val if shard not in train]


def _parts(pattern: str) -> tuple[str, str]:
    """The training pattern and the validation pattern ("" where there is none)."""
    for brace in re.finditer(r"\{([^{}]*)\}", pattern):
        words = brace[1].split(",")
        if "train" in words:
            start, end = pattern[: brace.start()], pattern[brace.end() :]
            others = [word for word in words if word != "train"]
            return f"{start}train{end}", f"{start}{{{','.join(others)}}}{end}" if others else ""
    return pattern, ""


def expand(pattern: str) -> list[str]:
    """Braces written out: a{1,2} and a{08..10}, as the shell does."""
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if brace is None:
        return [pattern] if pattern else []
    run = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
    if run:
        width = len(run[1]) if run[1].startswith("0") else 0
        words = [f"{i:0{width}}" for i in range(int(run[1]), int(run[2]) + 1)]
    else:
        words = brace[1].split(",")
    return [
        made
        for word in words
        for made in expand(pattern[: brace.start()] + word + pattern[brace.end() :])
    ]


def _matching(pattern: str) -> list[Path]:
    """Existing files; one that is written out and missing is an error, as it is missing from the training too."""
    found: list[Path] = []
    for one in expand(pattern):
        matches = sorted(glob.glob(one))
        if not matches and not glob.has_magic(one):
            hint = nearest_path(Path(one))
            raise UserError(
                f"the shard {one} does not exist: expected all that {pattern} names; check the pattern{hint}"
            )
        found += map(Path, matches)
    return found


def _fetched(url: str) -> Path:
    """The shard in the cache folder, fetched where it is not there yet."""
    import shutil
    import urllib.request

    folder = cache_folder("wds") / sha256(url.rpartition("/")[0].encode()).hexdigest()[:16]
    file = folder / url.rpartition("/")[2].partition("?")[0]
    if file.is_file():
        return file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        print(f"downloading {url} into {folder}", file=sys.stderr)
        with (
            urllib.request.urlopen(url, timeout=60) as stream,
            replacing(file) as partial,
            open(partial, "wb") as out,
        ):
            shutil.copyfileobj(stream, out)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot download the shard {url} ({reason}): check the address and the network, or fetch the shards "
            "yourself and name their files"
        ) from error
    return file


def _named_classes(folder: Path) -> tuple[str, ...]:
    file = folder / "classes.txt"
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines() if file.is_file() else []
    except UnicodeDecodeError as error:
        raise UserError(
            f"cannot read {file} ({error}): expected UTF-8, a class a line; save it as such"
        ) from error
    names = [line.strip() for line in lines if line.strip()]
    return distinct(names, [str(label) for label in range(len(names))])


def read_shards(shards: Sequence[Path], on_bad_image: str) -> Samples:
    """The samples of all shards, in order; what is damaged or incomplete is an error, or counted and left out."""
    samples = Samples(list(shards))
    for number, shard in enumerate(shards):
        try:
            for name, members, labels in _grouped(shard):
                _add(samples, number, name, members, labels, on_bad_image)
        except (tarfile.TarError, OSError, EOFError) as error:
            if on_bad_image != "skip":
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UserError(
                    f"cannot read the shard {shard} ({reason}): expected a whole tar file, not compressed; fetch it "
                    "again, or do without the rest of it with --on-bad-image skip"
                ) from error
            samples.skipped += 1
    if not samples.labels:
        raise UserError(
            f"{shards[0]} has no samples: expected members like 0001.jpg and 0001.cls; check the shards"
        )
    return samples


Member = tuple[int, int]


def _grouped(shard: Path) -> Iterator[tuple[str, list[Member], dict[str, bytes]]]:
    """Each sample's name, the place and length of its images, and the contents of its labels."""
    with tarfile.open(shard, "r:") as tar:
        name: str | None = None
        images: list[Member] = []
        labels: dict[str, bytes] = {}
        for member in tar:
            if not member.isfile() or Path(member.name).name.startswith("."):
                continue
            # A sample is what has the same name up to the first dot of the file's own name.
            folder, slash, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            key, extension = folder + slash + stem, extension.lower()
            if key != name:
                if name is not None:
                    yield name, images, labels
                name, images, labels = key, [], {}
            if extension.rpartition(".")[2] in IMAGES:
                images.append((member.offset_data, member.size))
            elif extension in ("cls", "json"):
                stream = tar.extractfile(member)
                labels[extension] = stream.read() if stream is not None else b""
        # Where a shard is cut off between two members, the tar file only seems to have come to its end.
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"it is damaged or cut off at byte {tar.offset:,}")
        if name is not None:
            yield name, images, labels


def _add(
    samples: Samples,
    number: int,
    name: str,
    images: list[Member],
    labels: dict[str, bytes],
    on_bad_image: str,
) -> None:
    if not images and not labels:
        return  # a file about the data set
    label = _label(labels)
    if not images or label is None:
        if on_bad_image == "skip":
            samples.skipped += 1
            return
        lacks = "image" if not images else "label (.cls, or .json with cls or label)"
        raise UserError(
            f"{samples.shards[number]}, sample {name}, has no {lacks}: expected both, one right after the other; "
            "mend it, or leave such out with --on-bad-image skip"
        )
    offset, length = images[0]
    samples.shard.append(number)
    samples.offset.append(offset)
    samples.length.append(length)
    samples.names.append(name)
    samples.labels.append(label)


def _label(found: dict[str, bytes]) -> int | str | None:
    value: Any = None
    if "cls" in found:
        value = found["cls"].decode("utf-8", "replace").strip()
    elif "json" in found:
        try:
            about = json.loads(found["json"])
        except ValueError:
            return None
        value = (
            next((about[key] for key in LABEL_KEYS if key in about), None)
            if isinstance(about, dict)
            else about
        )
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"-?\d+", value) else value or None
    return int(value) if isinstance(value, int) else None


def _mixed(samples: Samples) -> tuple[str, ...]:
    """What is to be said where some labels are words and others whole numbers: seldom is that meant."""
    words = [i for i, label in enumerate(samples.labels) if isinstance(label, str)]
    if len(words) == len(samples.labels):
        return ()
    i = words[0]
    return (
        f"warning: {len(words):,} of {len(samples.labels):,} labels are no whole numbers ({samples.labels[i]!r} of "
        f"{samples.shards[samples.shard[i]]}, sample {samples.names[i]}), so all are taken as words",
    )


def _labels(samples: Samples, words: bool) -> Labels:
    """All as words, or all as whole numbers (a word among them is -1, which is no class)."""
    if words:
        return [str(label) for label in samples.labels]
    return np.array(
        [-1 if isinstance(label, str) else label for label in samples.labels], dtype=np.int64
    )


class TarReader(Reader):
    """Images at their places in tar files."""

    def __init__(self, samples: Samples) -> None:
        self.shards = tuple(samples.shards)
        places = (samples.shard, samples.offset, samples.length)
        self._places: NDArray[np.int64] = np.array(places, dtype=np.int64).T
        self._names = Packed(samples.names)

    def __len__(self) -> int:
        return len(self._places)

    def encoded(self, i: int) -> Encoded:
        shard, offset, length = self._places[i].tolist()
        # Opened each time: there may be more shards than a process may hold open.
        with open(self.shards[shard], "rb", buffering=0) as file:
            file.seek(offset)
            return file.read(length)

    def file(self, i: int) -> str:
        return f"{self.shards[int(self._places[i, 0])].name}:{self._names[i]}"

    def place(self, i: int) -> str:
        return f"{self.shards[int(self._places[i, 0])]}, sample {self._names[i]}"
