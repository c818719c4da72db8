"""Labels that are no classes, patterns without end, and paths that no system opens."""

import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attention_transfer.data.open import open_data
from attention_transfer.data.options import DataOptions
from attention_transfer.data.shards import expand_braces, find_shards
from attention_transfer.errors import UserError
from attention_transfer.options import from_mapping

BILLION = 10**9


@pytest.fixture
def png(picture):
    stream = io.BytesIO()
    picture().save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def table(tmp_path, png):
    """A parquet data set of an image and other columns."""

    def write(**columns):
        count = len(next(iter(columns.values())))
        folder = tmp_path / "table"
        folder.mkdir(exist_ok=True)
        content = {"image": [{"bytes": png, "path": None}] * count} | columns
        pq.write_table(pa.table(content), folder / "train-0.parquet")
        return f"parquet:{folder}"

    return write


@pytest.fixture
def shard(tmp_path, png):
    """A shard of images with the contents of their .cls files."""

    def write(*labels, extension="cls"):
        folder = tmp_path / "shards"
        folder.mkdir(exist_ok=True)
        with tarfile.open(folder / "train-0.tar", "w") as tar:
            for i, label in enumerate(labels):
                for name, content in ((f"{i}.png", png), (f"{i}.{extension}", label.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        return f"wds:{folder}"

    return write


def refusal(spec, **options):
    with pytest.raises(UserError) as caught:
        open_data(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_label_of_a_billion_in_a_table(table):
    said = refusal(table(label=[0, 1, BILLION, 1]))
    assert "train-0.parquet, row 2: the label 1000000000 is too large for a class number" in said
    assert "4 images: correct it, name another label column, or give the classes names" in said


def test_a_label_of_a_billion_in_a_shard(shard):
    said = refusal(shard("0", "1", str(BILLION), "1"))
    assert "train-0.tar, sample 2: the label 1000000000 is too large for a class number" in said


def test_few_images_of_many_classes_are_no_mistake(table, shard):
    for spec in (table(label=[999, 999, 3, 3]), shard("999", "999", "3", "3")):
        assert len(open_data(spec).classes) == 1000
    assert "the label 1000 is too large" in refusal(table(label=[1000, 1000, 3, 3]))


def test_a_number_beyond_all_integers(table):
    said = refusal(table(label=pa.array([0, 1, 2**63 + 1], pa.uint64())))
    assert "train-0.parquet, column 'label': cannot read the labels (" in said


@pytest.mark.parametrize("digits", [19, 400, 5000])
@pytest.mark.parametrize("sign", ["", "-"])
def test_a_label_of_many_digits(shard, digits, sign):
    spec = shard("0", "0", sign + "9" * digits)
    said = refusal(spec)
    assert "train-0.tar, sample 2, has a label of more than 18 digits: expected the number" in said
    assert open_data(spec, on_bad_image="skip").skipped == 1


@pytest.mark.parametrize(
    "label", ["9" * 5000, "[" * 100_000, '{"cls": [3]}', '{"cls": null}', "3."]
)
def test_a_label_in_json_that_is_none(shard, label):
    assert "sample 0, has no label" in refusal(shard(label, extension="json"))


def test_an_id_is_not_taken_for_a_label(table):
    breeds = ["cat", "cat", "dog", "dog"]
    data = open_data(table(id=[4, 5, 6, 7], file_name=["a", "b", "c", "d"], breed=breeds))
    assert data.classes == ("cat", "dog")
    said = refusal(table(image_id=[BILLION, 1, 2, 3]))
    assert "has no label column, unless 'image_id' is one" in said
    assert said.endswith("#label=image_id")


@pytest.mark.parametrize("values", [list(range(20)), list("abcdefghijklmnopqrst")])
def test_another_value_in_each_row_is_no_label(table, values):
    spec = table(number=values)
    said = refusal(spec)
    assert "row 0: the column 'number' has a different value in each row, like an id" in said
    assert "if it has labels, add #label=number" in said
    # One image of each class: now the user has said so.
    assert "needs a class with at least 2 training images" in refusal(f"{spec}#label=number")
    assert "needs a class with at least 2 training images" in refusal(table(label=values))
    assert "needs a class with at least 2 training images" in refusal(table(number=values[:19]))


def test_files_that_hold_images_in_different_ways(table, png, tmp_path):
    spec = table(label=[0, 0, 1, 1])
    for images in ([png] * 4, [1, 2, 3, 4], ["a"] * 4):
        other = pa.table({"image": images, "label": [0, 0, 1, 1]})
        pq.write_table(other, tmp_path / "table" / "train-1.parquet")
        assert f"the files of {tmp_path}/table store images as different types (" in refusal(spec)
    (tmp_path / "table" / "train-1.parquet").unlink()
    pq.write_table(
        pa.table({"image": [png] * 4, "label": [0, 0, 1, 1]}), tmp_path / "table" / "val-0.parquet"
    )
    assert len(open_data(spec).val) == 4
    pq.write_table(
        pa.table({"image": pa.array([{"bytes": png}] * 4), "label": [0, 0, 1, 1]}),
        tmp_path / "table" / "train-1.parquet",
    )
    assert open_data(spec).record.images == 8


@pytest.mark.parametrize("features", [[], "x", {"label": {"names": 3}}, {"label": {"names": None}}])
def test_metadata_that_says_nothing(table, features, tmp_path):
    spec = table(label=[0, 0, 1, 1])
    file = tmp_path / "table" / "train-0.parquet"
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pq.read_table(file).replace_schema_metadata(about), file)
    assert open_data(spec).classes == ("0", "1")


@pytest.mark.parametrize("column", [[1, 2, 3, 4], ["a"] * 4, [0.5] * 4, [{"bytes": 1}] * 4])
def test_metadata_that_calls_anything_an_image(table, column, tmp_path):
    spec = table(label=[0, 0, 1, 1], photo=column)
    file = tmp_path / "table" / "train-0.parquet"
    about = {"huggingface": json.dumps({"info": {"features": {"photo": {"_type": "Image"}}}})}
    pq.write_table(pq.read_table(file).replace_schema_metadata(about), file)
    for stream in ("on", "off"):
        said = refusal(spec, stream=stream)
        assert "train-0.parquet, row" in said and "(it has no bytes): expected a whole" in said


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..999999999}.tar",
        "{0..9999}{0..9999}",
        "{0..999999999999999999}{5..3}",
        "{a,b}" * 30,
        "{{0..99999},{0..99999}}",
    ],
)
def test_patterns_of_too_many_shards(pattern):
    with pytest.raises(UserError, match=r"names too many shards: expected at most 100,000 in"):
        expand_braces(pattern)


def test_numbers_of_shards_count_down_as_in_a_shell():
    assert expand_braces("{3..1}") == ["3", "2", "1"]
    assert len(expand_braces("{00000..99999}")) == 100_000


def test_a_number_of_400_digits_names_no_shard(tmp_path):
    said = refusal(f"wds:{tmp_path}/{{0..{'9' * 400}}}.tar")
    assert "does not exist" in said


def test_addresses_with_spaces_are_quoted(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []

    def answer(address, timeout):
        asked.append(address)
        return io.BytesIO(b"x")

    monkeypatch.setattr("urllib.request.urlopen", answer)
    files, _ = find_shards("http://host/my shards/größe%20a.tar?key=1")
    assert asked == ["http://host/my%20shards/gr%C3%B6%C3%9Fe%20a.tar?key=1"]
    assert files[0].read_bytes() == b"x"


@pytest.mark.parametrize(
    "address", ["http://host:port/a.tar", "http://[::1/a.tar", f"http://127.0.0.1:9/{'a' * 400}"]
)
def test_addresses_that_are_none(address, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "cannot download the shard" in refusal(f"wds:{address}")


@pytest.mark.parametrize("kind", ["folder", "parquet", "wds", "cifar10"])
def test_paths_that_cannot_be_opened(kind, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for place in (loop, tmp_path / ("a" * 400), "~no-such-user/x"):
        said = refusal(f"{kind}:{place}")
        assert str(place) in said and "; " in said


def test_a_folder_that_may_not_be_read(make_folder, monkeypatch):
    root = make_folder()

    def refuse(*args):
        raise PermissionError(13, "Permission denied", str(root / "train"))

    monkeypatch.setattr("attention_transfer.data.image_folder.class_folders", refuse)
    said = refusal(f"folder:{root}")
    assert f"cannot open folder:{root}: {root}/train: Permission denied; check the path" in said


def test_a_pipe_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "train.tar")
    said = refusal(f"wds:{tmp_path}/train*.tar")
    assert "train.tar of " in said and "train*.tar is not a file: expected a tar file" in said
    assert "matches no shard" in refusal(f"wds:{tmp_path}")


def test_loops_of_links_within_a_folder(make_folder):
    root = make_folder()
    (root / "train" / "cat" / "again").symlink_to(root / "train")
    (root / "train" / "cat" / "9.png").symlink_to(root / "train" / "cat" / "9.png")
    assert len(open_data(f"folder:{root}").train) == 8


@pytest.mark.parametrize(
    "row", ["train/cat/0.png,0,0,1," + "9" * 30, "train/cat/0.png,0,0,1," + "9" * 5000, "x", ""]
)
def test_boxes_that_are_none(make_folder, row):
    root = make_folder()
    (root / "boxes.csv").write_text(f"x_min,y_min,x_max,y_max,file\n0,0,1\n{row}\n")
    assert "boxes.csv, line 2: expected a file and four whole" in refusal(f"folder:{root}")
    (root / "boxes.csv").write_text(f"file,x_min,y_min,x_max,y_max\n{row}\n")
    if row:
        assert "boxes.csv, line 2: expected a file and four whole" in refusal(f"folder:{root}")


def test_names_of_classes_that_are_not_utf8(make_folder):
    root = make_folder()
    for part in ("train", "val"):
        (root / part / "cat").rename(root / part / "c\udcfft")
    names = open_data(f"folder:{root}").classes
    assert sorted(names) == ["c?t", "dog"]


@pytest.mark.parametrize("option", ["image_size", "workers"])
def test_numbers_beyond_all_machines(option):
    with pytest.raises(
        UserError, match=f"{option} is 999999999: expected a whole number .* and ≤ "
    ):
        from_mapping(DataOptions, {option: 999_999_999})


def test_labels_of_many_images_are_counted_by_them(table):
    spec = table(label=np.repeat(np.arange(1500), 2))
    assert len(open_data(spec).classes) == 1500
