"""Fingerprints of data: the same for every choice of some images, another for other images."""

import json
import os
import re
import shutil
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attention_transfer.data import reader
from attention_transfer.data.open import open_data


@pytest.fixture
def root(make_folder):
    return make_folder(train=5)


def pack(root, picture_files, shard):
    """A tar shard of PNG files, each with the name of its folder as the label."""
    with tarfile.open(shard, "w") as tar:
        for i, file in enumerate(picture_files):
            label = shard.parent / f"{i}.cls"
            label.write_text(file.parent.name)
            tar.add(file, f"{i:04}.png")
            tar.add(label, f"{i:04}.cls")
            label.unlink()


def tabulate(picture_files, parquet):
    names = sorted({file.parent.name for file in picture_files})
    images = [{"bytes": file.read_bytes(), "path": None} for file in picture_files]
    labels = pa.array([names.index(file.parent.name) for file in picture_files])
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    table = pa.table({"image": images, "label": labels}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pq.write_table(table, parquet)


@pytest.fixture(params=["folder", "wds", "parquet"])
def packed(request, root, tmp_path):
    """Writes the training images of `root` in a format, and names the data."""
    place = root
    if request.param != "folder":
        place = tmp_path / request.param
        place.mkdir()

    def write():
        files = sorted((root / "train").rglob("*.png"))
        if request.param == "wds":
            pack(root, files, place / "train-0.tar")
        elif request.param == "parquet":
            tabulate(files, place / "train-0.parquet")
        return f"{request.param}:{place}"

    return write


def fingerprint(spec, **options):
    return open_data(spec, **options).fingerprint


def swap_classes(root):
    cat, dog, other = (root / "train" / name for name in ("cat", "dog", "other"))
    cat.rename(other)
    dog.rename(cat)
    other.rename(dog)


def test_every_choice_of_the_images_has_one(packed):
    spec = packed()
    value = fingerprint(spec)
    assert re.fullmatch(r"[0-9a-f]{16}", value)
    for options in (
        {"seed": 1, "limit_train": 4},
        {"val_split": 0.4},
        {"stream": "on"},
        {"on_bad_image": "skip"},
    ):
        assert fingerprint(spec, **options) == value


def test_it_does_not_depend_on_the_place(packed, root, tmp_path):
    kind, _, place = packed().partition(":")
    value = fingerprint(f"{kind}:{place}")
    shutil.copytree(place, tmp_path / "elsewhere")
    assert fingerprint(f"{kind}:{tmp_path / 'elsewhere'}") == value


def test_other_images_have_another(packed, root, picture):
    spec = packed()
    seen = {fingerprint(spec), fingerprint(spec, image_size=16)}
    (root / "train" / "dog" / "4.png").unlink()
    seen.add(fingerprint(packed()))
    swap_classes(root)
    seen.add(fingerprint(packed()))
    picture(12, 12).save(root / "train" / "cat" / "1.png")
    seen.add(fingerprint(packed()))
    (root / "train" / "cat").rename(root / "train" / "bird")
    shutil.rmtree(root / "val", ignore_errors=True)
    seen.add(fingerprint(packed()))
    assert len(seen) == 6


def test_swapped_classes_whose_files_are_of_one_size(make_folder, picture):
    root = make_folder()
    for number, file in enumerate(sorted((root / "train").rglob("*.png"))):
        picture(seed=number).save(file.with_suffix(".bmp"))
        file.unlink()
    sizes = {os.stat(file).st_size for file in (root / "train").rglob("*.bmp")}
    value = fingerprint(f"folder:{root}")
    swap_classes(root)
    assert len(sizes) == 1 and fingerprint(f"folder:{root}") != value


def test_images_in_memory_are_told_apart_by_their_pixels(monkeypatch):
    data = open_data("digits")
    assert open_data("digits", limit_train=100).fingerprint == data.fingerprint
    assert data.record.images == 12_000 and data.record.classes == 10
    assert data.record.val_fingerprint != data.fingerprint
    monkeypatch.setattr("attention_transfer.data.digits.SCENES_SEED", 1)
    assert open_data("digits").fingerprint != data.fingerprint


def test_the_record_of_a_folder(root):
    record = open_data(f"folder:{root}", limit_train=4).record
    assert (record.images, record.classes) == (10, 2)
    shutil.copy(root / "train" / "cat" / "0.png", root / "val" / "cat" / "1.png")
    other = open_data(f"folder:{root}").record
    assert other.fingerprint == record.fingerprint
    assert other.val_fingerprint != record.val_fingerprint
    assert open_data(f"folder:{root}", val_split=0.5).record.val_fingerprint is None


def test_most_images_are_not_read(make_folder, monkeypatch):
    root = make_folder(train=100)
    read = []
    encoded = reader.FileReader.encoded
    monkeypatch.setattr(
        reader.FileReader, "encoded", lambda self, i: read.append(i) or encoded(self, i)
    )
    open_data(f"folder:{root}", stream="on", image_size=8, limit_train=2, limit_val=2)
    # Four images of the folder of validation, the two that the statistics are of, and the sample.
    assert len(read) <= 4 + 2 + 64
