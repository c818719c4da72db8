"""Specs, folders, shards and tables of any content: they open, or one line says what is wrong."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from attention_transfer.data.augment import Augment
from attention_transfer.data.images import ImageSet
from attention_transfer.data.open import open_data, prepare_data
from attention_transfer.data.options import DATA_SPECS, AugmentOptions, DataOptions
from attention_transfer.data.stream import Stream
from attention_transfer.data.transforms import make_transform
from attention_transfer.errors import RunError, UserError
from attention_transfer.options import option_specs


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refuse(*args: Any, **options: Any) -> Any:
        raise OSError("no network in this test")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (5, 4)) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, 1).save(stream, kind)
    return stream.getvalue()


IMAGES = [
    encoded("PNG"),
    encoded("PNG", "L", (1, 1)),
    encoded("PNG", "I;16"),
    encoded("PNG", "P", (64, 1)),
    encoded("JPEG", "CMYK"),
    encoded("GIF", "P", (3, 9)),
    encoded("TIFF", "F"),
    encoded("BMP", "1"),
]
# Numbers and words as people and programs leave them.
ODD_TEXT = st.one_of(
    st.sampled_from(["", " ", "0", "1", "2", "-1", "1.0", "nan", "1e9", "cat", "dog", "0\n", "٣"]),
    st.sampled_from(["\ufeff0", "9" * 19, "9" * 400, "-" + "9" * 5000, "[" * 3000, "\0", "null"]),
    st.sampled_from(["{}", '{"cls": 1}', '{"label": "cat"}', '{"cls": 1e400}', '{"cls": "1"}']),
    st.text(max_size=12),
)


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """The content as it is, cut off, or with some bytes overwritten."""
    made = bytearray(content)
    damage = draw(st.sampled_from(["none", "none", "none", "cut", "overwrite"]))
    if damage == "cut":
        return bytes(made[: draw(st.integers(0, len(made)))])
    if damage == "overwrite" and made:
        for _ in range(draw(st.integers(1, 8))):
            made[draw(st.integers(0, len(made) - 1))] = draw(st.integers(0, 255))
    return bytes(made)


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def as_lines(lines: list[str]) -> bytes:
    return as_bytes("\n".join(lines))


pictures = st.sampled_from(IMAGES).flatmap(damaged)
anything = st.one_of(pictures, pictures, st.binary(max_size=40), ODD_TEXT.map(as_bytes))
options = st.fixed_dictionaries(
    {},
    optional={
        "image_size": st.integers(1, 12),
        "limit_train": st.integers(1, 9),
        "limit_val": st.integers(1, 9),
        "val_split": st.floats(0.01, 0.99),
        "on_bad_image": st.sampled_from(["error", "skip"]),
        "stream": st.sampled_from(["auto", "on", "off"]),
        "seed": st.integers(0, 3),
    },
)
augments = st.fixed_dictionaries(
    {},
    optional={
        "augment": st.sampled_from(["crop", "imagenet"]),
        "crop_padding": st.integers(0, 5),
        "views": st.integers(1, 3),
    },
)


def is_named(message: str, *names: str) -> bool:
    """Whether a message names one of `names`, or an option."""
    keys = [*option_specs(DataOptions), *option_specs(AugmentOptions), "batch_size"]
    flags = ["--" + key.replace("_", "-") for key in keys]
    return any(name and name in message for name in [*names, *keys, *flags])


@contextmanager
def refused_in_words(*names: str) -> Iterator[None]:
    try:
        yield
    except (UserError, RunError) as error:
        message = " ".join(str(error).split("\n"))
        assert message.strip() and "Traceback" not in message
        assert is_named(message, *names), message


def use(spec: str, data_options: dict[str, Any], augment: dict[str, Any]) -> None:
    """What a run does with data: opens it, trains an epoch and validates."""
    data = open_data(spec, workers=0, **data_options)
    assert len(data.train) and len(data.val) and len(data.fingerprint) == 16
    assert int(data.train.labels.max()) < len(data.classes) <= max(1000, data.record.images)
    chosen = AugmentOptions(**augment)
    loader: Any
    if isinstance(data.train, ImageSet):
        loader = Augment(data.train, chosen.crop_padding, chosen.flip, chosen.views)
    else:
        loader = Stream(data.train, make_transform(chosen, data.train.size), views=chosen.views)
    plan = loader.epoch(0, 1, 3)
    for step in range(len(plan)):
        x, y, rows = loader.batch(plan, step)
        assert x.dtype == torch.uint8 and x.shape[1:] == (3, *data.image_size)
        assert len(x) == len(y) == len(rows) and int(rows.max()) < data.train.source_size
    if isinstance(data.val, ImageSet):
        assert data.val.batch(slice(0, 2)).dtype == torch.uint8
    else:
        assert len(list(data.val.batches(2))) == -(-len(data.val) // 2)


PLACES = st.one_of(
    st.sampled_from(["", ".", "..", "~", "~nobody/x", "/", "/dev/null", "/dev/zero", "a b", "\0"]),
    st.sampled_from(["#", "#image=", "x#label=y", ".#image=a,label=b", "me/pets", "me/pets:one"]),
    st.sampled_from(["a" * 300, "a/" * 2100, "/proc/self/mem", "\udcff", "**", "*" * 50, "[a-"]),
    st.sampled_from(["http://host/a b.tar", "http://[", "https://h:x/{0..3}.tar", "s3://x"]),
    st.sampled_from(["{0..999999999}.tar", "{a,b}" * 40, "{{a},{b}}", "{", "}{", "{3..1}", "{}"]),
    st.sampled_from(["pipe:true", "{0..٣}", "{train,val}-{000..002}.tar"]),
    st.text(max_size=20),
    st.text(alphabet="{},.*?[]#=:/~ab01", max_size=20),
)
KINDS = st.one_of(
    st.sampled_from([spec.partition("[")[0].partition(":")[0] for spec in DATA_SPECS]),
    st.text(max_size=8),
)


@fuzz(150)
@given(kind=KINDS, colon=st.sampled_from([":", ":", ":", "", "::"]), place=PLACES)
def test_any_spec(kind, colon, place):
    spec = kind + colon + place
    if spec == "digits":
        return
    path = os.path.expanduser(place)
    names = [spec, repr(spec), kind, spec.partition(":")[2], place, path, str(Path(path))]
    # A message about one shard names it in the place of the pattern.
    names += [place.partition("{")[0], place.rpartition("}")[2]]
    for function in (open_data, prepare_data):
        with refused_in_words(*names):
            function(spec)


FOLDERS = ["", "train", "train/cat", "train/dog", "val/cat", "val/dog", "test/cat", ".hidden"]
FOLDERS += ["cat", "dog/more", "train/c\udcfft", "data", "cifar-10-batches-py"]
NAMES = ["0.png", "1.PNG", "2.jpg", "._0.png", "a b.webp", "x.txt", "classes.csv", "boxes.csv"]
NAMES += ["classes.txt", "train-0.tar", "val-0.tar", "train-0.parquet", "data_batch_1"]
TABLE_LINES = ["file,x_min,y_min,x_max,y_max", "train/cat/0.png,0,0,3,3", "cat,Katze", "dog,", ","]
tables_of_text = st.lists(st.one_of(st.sampled_from(TABLE_LINES), ODD_TEXT), max_size=4)
contents = st.one_of(
    anything,
    tables_of_text.map(as_lines),
    st.sampled_from(["folder", "loop", "dangling", "pipe"]),
)
files = st.lists(st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES), contents), max_size=12)


def place_file(file: Path, content: bytes | str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_symlink() or file.exists():
        return
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "folder":
        file.mkdir()
    elif content == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(file if content == "loop" else "missing")


@fuzz(60)
@given(
    kind=st.sampled_from(["folder", "folder", "folder", "wds", "parquet", "cifar10", "cifar100"]),
    whole=st.booleans(),
    files=files,
    data_options=options,
    augment=augments,
)
def test_any_folder(kind, whole, files, data_options, augment):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if whole:  # a good data set, beside which the files lie
            for part in ("train", "val"):
                for label in ("cat", "dog"):
                    for i in range(4):
                        place_file(root / part / label / f"image{i}.png", IMAGES[0])
        for folder, file, content in files:
            if not (root / folder).exists() or (root / folder).is_dir():
                place_file(root / folder / file, content)
        with refused_in_words(name):
            use(f"{kind}:{name}", data_options, augment)


members = st.lists(
    st.tuples(
        st.sampled_from(["0", "1", "2", "a/3", "../4", "/5", ".6", ""]),
        st.sampled_from(["png", "cls", "json", "txt", "JPG", "seg.png", ""]),
        anything,
    ),
    max_size=12,
)
classes_file = st.one_of(st.none(), tables_of_text)


@st.composite
def tar_files(draw: Any) -> bytes:
    stream = io.BytesIO()
    form = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        if draw(st.booleans()):
            for i, label in enumerate(draw(st.lists(ODD_TEXT | st.just("1"), max_size=6))):
                content = {"png": IMAGES[0], "cls": as_bytes(label)}
                for extension, value in content.items():
                    member = tarfile.TarInfo(f"sample{i}.{extension}")
                    member.size = len(value)
                    tar.addfile(member, io.BytesIO(value))
        for stem, extension, value in draw(members):
            member = tarfile.TarInfo(f"{stem}.{extension}")
            member.type = draw(st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.SYMTYPE]))
            member.size = len(value) * (member.type == tarfile.REGTYPE)
            tar.addfile(member, io.BytesIO(value))
    return draw(damaged(stream.getvalue()))


@fuzz(60)
@given(
    shards=st.lists(tar_files(), min_size=1, max_size=2),
    classes=classes_file,
    data_options=options,
    augment=augments,
)
def test_any_shards(shards, classes, data_options, augment):
    with tempfile.TemporaryDirectory() as name:
        for content, file in zip(shards, ("train-0.tar", "val-0.tar"), strict=False):
            Path(name, file).write_bytes(content)
        if classes is not None:
            Path(name, "classes.txt").write_bytes(as_lines(classes))
        with refused_in_words(name):
            use(f"wds:{name}", data_options, augment)


numbers = st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 4)
COLUMNS = {
    pa.int64(): numbers,
    pa.uint64(): st.integers(0, 2**64 - 1) | st.integers(0, 3),
    pa.int8(): st.integers(-128, 127),
    pa.bool_(): st.booleans(),
    pa.string(): ODD_TEXT.filter(lambda text: text.isprintable()),
    pa.float64(): st.floats(),
    pa.binary(): anything,
    pa.list_(pa.int64()): st.lists(numbers, max_size=2),
    pa.dictionary(pa.int8(), pa.string()): st.sampled_from(["cat", "dog"]),
    pa.dictionary(pa.int8(), pa.int64()): st.integers(0, 3),
    pa.null(): st.none(),
}
IMAGE_STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})
structs = st.fixed_dictionaries(
    {
        "bytes": st.none() | anything,
        "path": st.sampled_from([None, "", "x.png", "../x", "/dev/null", "\0", "a" * 300]),
    }
)
FEATURES = st.one_of(
    st.sampled_from([{}, [], None, 3, {"label": None}, {"label": {"_type": "ClassLabel"}}]),
    st.fixed_dictionaries(
        {
            "label": st.fixed_dictionaries(
                {
                    "_type": st.sampled_from(["ClassLabel", "Value", "Image", 3]),
                    "names": st.sampled_from([["a", "b", "c", "d", "e"], ["a", "a"], [], 3, None]),
                }
            )
        }
    ),
)


@st.composite
def parquet_files(draw: Any) -> bytes:
    count = draw(st.integers(0, 8))

    def values(strategy: Any) -> Any:
        return draw(st.lists(strategy | st.none(), min_size=count, max_size=count))

    columns = {}
    if draw(st.booleans()):
        columns["label"] = pa.array([i % 2 for i in range(count)], pa.int64())
        columns["image"] = pa.array([{"bytes": IMAGES[0], "path": None}] * count, IMAGE_STRUCT)
    names = st.sampled_from(["image", "label", "id", "x", "fine_label", "__key__"])
    for name in draw(st.lists(names, max_size=2)):
        kind = draw(st.sampled_from([*COLUMNS, IMAGE_STRUCT]))
        strategy = COLUMNS.get(kind, structs)
        columns[name] = pa.array(values(strategy), kind)
    table = pa.table(columns)
    if draw(st.booleans()):
        about = json.dumps({"info": {"features": draw(FEATURES)}})
        table = table.replace_schema_metadata({"huggingface": about})
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return draw(damaged(stream.getvalue()))


@fuzz(60)
@given(
    content=st.lists(parquet_files(), min_size=1, max_size=2),
    part=st.sampled_from(["val-0.parquet", "train-1.parquet"]),
    suffix=st.sampled_from(["", "", "", "#label=id", "#image=x,label=x", "#image=image"]),
    data_options=options,
    augment=augments,
)
def test_any_tables(content, part, suffix, data_options, augment):
    with tempfile.TemporaryDirectory() as name:
        for value, file in zip(content, ("train-0.parquet", part), strict=False):
            Path(name, file).write_bytes(value)
        with refused_in_words(name):
            use(f"parquet:{name}{suffix}", data_options, augment)


ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    ODD_TEXT,
    st.just(10**400),
    st.lists(st.floats(), max_size=3).map(tuple),
)
OPTION_NAMES = st.sampled_from([*option_specs(DataOptions), "image-size", "sed", ""])


@fuzz(60)
@given(changes=st.dictionaries(OPTION_NAMES, ODD_VALUES, max_size=3))
def test_any_option(changes):
    changes.pop("data", None)
    with tempfile.TemporaryDirectory() as name:
        for part in ("train", "val"):
            place_file(Path(name, part, "cat", "0.png"), IMAGES[0])
        with refused_in_words(name, "unknown option"):
            open_data(f"folder:{name}", **changes)


def test_the_fuzzers_open_good_data_too():
    """Otherwise they would try the ways of refusing only."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        for part in ("train", "val"):
            for label in ("cat", "dog"):
                for i in range(4):
                    picture = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
                    (Path(name) / part / label).mkdir(parents=True, exist_ok=True)
                    picture.save(Path(name) / part / label / f"{i}.png")
        for stream in ("on", "off"):
            use(f"folder:{name}", {"stream": stream}, {"crop_padding": 2})
