"""Finds the shards of a `wds:` spec, which is a folder, a pattern or URLs."""

from __future__ import annotations

import glob
import math
import os
import re
import shutil
import string
import sys
import urllib.request
from hashlib import sha256
from http.client import HTTPException
from itertools import product
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock

from ..cache import cache_folder
from ..errors import UserError, first_line
from ..run_folder import replacing
from .cifar import LOCK_FILE
from .spec import VAL_NAMES, expanded, nearest_path, visible_files

EXPECTED = "expected a folder with train-*.tar, or a pattern like shards/{train,val}-{000..099}.tar"
MOST_SHARDS = 100_000
BRACE = re.compile(r"\{([^{}]*)\}")
# At most 18 digits: no shard has a longer number, and `int` refuses very long ones.
NUMBERS = re.compile(r"(\d{1,18})\.\.(\d{1,18})")


def find_shards(place: str) -> tuple[list[Path], list[Path]]:
    """The training and the validation shards, sorted; URLs are downloaded once into a cache.

    `place` is a folder with train*.tar and val*, valid*, validation* or test*.tar, or a pattern
    with {a,b}, {000..099}, * and ?. If one alternative of a brace is `train`, the others name the
    validation shards.
    """
    if place.startswith(("http://", "https://")):
        train_urls, val_urls = (expand_braces(pattern) for pattern in _split_pattern(place))
        return [_download(url) for url in train_urls], [_download(url) for url in val_urls]
    if "://" in place or place.startswith("pipe:"):
        raise UserError(f"wds:{place}: expected files or http(s):// shards; fetch them first")
    folder = expanded(f"wds:{place}", place)
    if os.path.isdir(folder):
        train, val = visible_files(folder, "*train*.tar"), list[Path]()
        for name in VAL_NAMES:
            val = val or visible_files(folder, f"*{name}*.tar")
    else:
        train, val = (_matching_files(part, place) for part in _split_pattern(str(folder)))
    if not train and os.path.isdir(folder) and any(folder.glob("*.tar.*")):
        raise UserError(
            f"wds:{place} holds compressed shards only: {EXPECTED}; unpack them to .tar"
        )
    if not train:
        raise UserError(f"wds:{place} matches no shard: {EXPECTED}; check it")
    # The name of one shard may match both patterns, such as train-test.tar.
    return train, [shard for shard in val if shard not in train]


def _split_pattern(pattern: str) -> tuple[str, str]:
    """The training pattern and the validation pattern ("" if there is none)."""
    for brace in BRACE.finditer(pattern):
        words = brace[1].split(",")
        if "train" not in words:
            continue
        start, end = pattern[: brace.start()], pattern[brace.end() :]
        words.remove("train")
        val = ""
        if words:
            val = f"{start}{{{','.join(words)}}}{end}"
        return f"{start}train{end}", val
    return pattern, ""


def expand_braces(pattern: str) -> list[str]:
    """The names that a{1,2} and a{08..10} stand for, as in a shell.

    Raises:
        UserError: for more than 100,000 names.
    """
    if not pattern:
        return []
    parts = BRACE.split(pattern)  # every second part is the content of a brace
    choices = [_brace_words(part) if k % 2 else [part] for k, part in enumerate(parts)]
    if math.prod(len(words) for words in choices) > MOST_SHARDS:
        raise UserError(
            f"wds:{pattern} names too many shards: expected at most {MOST_SHARDS:,} in all; "
            "check its numbers"
        )
    return ["".join(words) for words in product(*choices)]


def _brace_words(content: str) -> list[str]:
    """The words of a brace; of a long range only as many as already are too many."""
    numbers = NUMBERS.fullmatch(content)
    if not numbers:
        return content.split(",")
    width = 0
    if numbers[1].startswith("0"):
        width = len(numbers[1])
    first, last = int(numbers[1]), int(numbers[2])
    values = range(first, last + 1)
    if last < first:
        values = range(first, last - 1, -1)
    return [f"{i:0{width}}" for i in values[: MOST_SHARDS + 1]]


def _matching_files(pattern: str, place: str) -> list[Path]:
    """Existing files; a name without * and ? that does not exist is an error.

    `place` is the pattern as the user wrote it, for messages: a path loses its last slash.
    """
    files: list[Path] = []
    for name in expand_braces(pattern):
        matches = _glob(name)
        if not matches and not glob.has_magic(name):
            raise UserError(
                f"the shard {name} does not exist: expected all shards of wds:{place}; "
                f"check the pattern{nearest_path(Path(name))}"
            )
        for match in map(Path, matches):
            if not os.path.isfile(match):  # reading a pipe would never end
                raise UserError(
                    f"the shard {match} of wds:{place} is not a file: expected a tar file; check it"
                )
            files.append(match)
    return files


def _glob(pattern: str) -> list[str]:
    try:
        return sorted(glob.glob(pattern))
    except ValueError:  # a null byte, which no path contains
        return []


def _download(url: str) -> Path:
    """The shard at `url`, downloaded into the cache folder if needed."""
    base, _, name = url.rpartition("/")
    # Shards at different addresses often have the same name.
    folder = cache_folder("wds") / sha256(base.encode()).hexdigest()[:16]
    file = folder / name.partition("?")[0]
    # Quotes spaces and non-ASCII letters, but not what is quoted already.
    address = quote(url, safe=string.punctuation)
    try:
        if file.is_file():
            return file
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK_FILE):
            if file.is_file():
                return file  # another process has downloaded it meanwhile
            print(f"downloading {url} into {folder}", file=sys.stderr)
            with (
                urllib.request.urlopen(address, timeout=60) as stream,
                replacing(file) as partial,
                open(partial, "wb") as out,
            ):
                shutil.copyfileobj(stream, out)
    except (OSError, ValueError, HTTPException) as error:
        raise UserError(
            f"cannot download the shard {url} ({first_line(error)}): check the address and the "
            "network, or fetch the shards yourself and name their files"
        ) from error
    return file
