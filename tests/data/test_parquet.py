import io
import json
import multiprocessing
import os
import pickle
import socket

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from attention_transfer.data import tables
from attention_transfer.data.images import make_generator
from attention_transfer.data.open import open_data
from attention_transfer.data.options import AugmentOptions
from attention_transfer.data.stream import Stream
from attention_transfer.data.transforms import make_transform
from attention_transfer.errors import UserError


@pytest.fixture(params=["in memory", "copied"], autouse=True)
def image_storage(request, monkeypatch):
    if request.param == "copied":
        monkeypatch.setattr(tables, "IN_MEMORY_BYTES", 0)
    return request.param


@pytest.fixture
def encoded(picture):
    def make(seed):
        stream = io.BytesIO()
        picture(seed=seed).save(stream, "PNG")
        return stream.getvalue()

    return make


@pytest.fixture
def write(tmp_path, encoded):
    """Writes one parquet file; `columns` replace or add to image and label, None leaves one out."""

    def make(name, labels=(0, 1, 2, 0), names=("a", "b", "c"), first_seed=0, group=3, **columns):
        images = [{"bytes": encoded(first_seed + i), "path": None} for i in range(len(labels))]
        table = {"image": images, "label": pa.array(labels, pa.int64())} | columns
        made = pa.table({key: value for key, value in table.items() if value is not None})
        if names:
            features = {
                "image": {"_type": "Image"},
                "label": {"_type": "ClassLabel", "names": list(names)},
            }
            made = made.replace_schema_metadata(
                {"huggingface": json.dumps({"info": {"features": features}})}
            )
        (tmp_path / "set").mkdir(exist_ok=True)
        pq.write_table(made, tmp_path / "set" / name, row_group_size=group)
        return tmp_path / "set"

    return make


def test_shards_row_groups_and_names(write, picture):
    write("train-00000-of-00002.parquet")
    write("train-00001-of-00002.parquet", labels=(2, 1), first_seed=4)
    root = write("test-00000-of-00001.parquet", labels=(1,), first_seed=9)
    data = open_data(f"parquet:{root}")
    assert data.classes == ("a", "b", "c") and data.train.labels.tolist() == [0, 1, 2, 0, 2, 1]
    for seed in range(6):
        assert np.array_equal(data.train.images[seed].numpy(), np.asarray(picture(seed=seed)))
    assert np.array_equal(data.val.images[0].numpy(), np.asarray(picture(seed=9)))
    assert data.train.files[3] == "train-00000-of-00002.parquet:3"
    assert data.train.files[4] == "train-00001-of-00002.parquet:0"


def test_a_split_called_valid(write):
    write("train-0.parquet")
    root = write("valid-0.parquet", labels=(1,))
    data = open_data(f"parquet:{root}")
    assert data.val.labels.tolist() == [1] and data.notes == ()


def test_limit_decodes_only_the_wanted_rows(write, encoded, picture):
    write("train-0.parquet", labels=[i % 3 for i in range(30)], group=4)
    root = write("val-0.parquet")
    data = open_data(f"parquet:{root}", limit_train=6)
    assert torch.bincount(data.train.labels).tolist() == [2, 2, 2]
    for image, label, file in zip(
        data.train.images, data.train.labels, data.train.files, strict=True
    ):
        row = int(file.rpartition(":")[2])
        assert row % 3 == label and np.array_equal(image.numpy(), np.asarray(picture(seed=row)))


def test_validation_goes_before_test_and_sub_folders_are_found(write):
    write("train-0.parquet")
    write("test-0.parquet", labels=(-1, -1))
    root = write("validation-0.parquet", labels=(2,))
    assert open_data(f"parquet:{root.parent}").val.labels.tolist() == [2]


def test_plain_binary_and_any_names_without_metadata(write, encoded):
    columns = {
        "image": None,
        "label": None,
        "pixels": [encoded(i) for i in range(3)],
        "kind": pa.array([0, 3, 1], pa.uint8()),
    }
    write("train-0.parquet", labels=(), names=None, **columns)
    root = write("val-0.parquet", labels=(), names=None, **columns)
    data = open_data(f"parquet:{root}")
    assert data.classes == ("0", "1", "2", "3") and data.train.labels.tolist() == [0, 3, 1]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_words_as_labels(write, kind):
    """A number that is no label (an id) does not win over words that are."""
    columns = {
        "label": pa.array(["cat", "ant", "cat", "bee"], pa.string()).cast(kind),
        "id": [7, 8, 9, 10],
    }
    write("train-0.parquet", names=None, **columns)
    root = write("val-0.parquet", labels=[0], names=None, label=pa.array(["bee"]))
    data = open_data(f"parquet:{root}")
    assert data.classes == ("ant", "bee", "cat") and data.train.labels.tolist() == [2, 0, 2, 1]
    assert data.val.labels.tolist() == [1]
    write("val-0.parquet", labels=[0], names=None, label=pa.array(["dog"]))
    with pytest.raises(
        UserError, match=r"val-0.parquet, row 0: the label 'dog' is none of the 3 classes"
    ):
        open_data(f"parquet:{root}")


def test_images_that_are_named_by_their_path(write, picture):
    root = write("train-0.parquet", image=[{"bytes": None, "path": f"{i}.png"} for i in range(4)])
    write("val-0.parquet")
    for i in range(4):
        picture(seed=50 + i).save(root / f"{i}.png")
    data = open_data(f"parquet:{root}")
    assert np.array_equal(data.train.images[2].numpy(), np.asarray(picture(seed=52)))


@pytest.mark.parametrize("path", ["{outside}", "../outside.png", "pipe.png"])
def test_a_table_names_no_file_outside_its_folder(write, picture, path):
    root = write("val-0.parquet")
    outside = root.parent / "outside.png"
    picture(seed=1).save(outside)
    os.mkfifo(root / "pipe.png")
    image = {"bytes": None, "path": path.format(outside=outside)}
    write("train-0.parquet", image=[image] * 4)
    with pytest.raises(UserError, match=r"train-0.parquet, row 0"):
        open_data(f"parquet:{root}")


def test_the_column_called_label_wins_over_other_numbers(write):
    write("train-0.parquet", names=None, width=[8] * 4)
    root = write("val-0.parquet", names=None, width=[8] * 4)
    assert open_data(f"parquet:{root}").train.labels.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": None, "names": None}, r"has no image column \(its columns: label \(int64\)\)"),
        (
            {"label": None, "names": None},
            r"has no label column \(its columns: image \(struct<.*>\)\)",
        ),
        (
            {"label": None, "names": None, "a": ["x"] * 4, "b": ["y"] * 4},
            r"several label columns \(a, b\)",
        ),
        (
            {"label": None, "names": None, "a": [1] * 4, "b": [2] * 4},
            r"several label columns \(a, b\) .*parquet:.*#label=a",
        ),
        (
            {"image": None, "names": None, "left": [b"1"] * 4, "right": [b"2"] * 4},
            r"several image columns \(left, right\).*parquet:.*#image=left",
        ),
        (
            {"labels": (0, 1, 3, 0)},
            r"train-0.parquet, row 2: the label 3 is out of range, expected 0 to 2",
        ),
        ({"labels": (0, -1, 1, 0)}, r"train-0.parquet, row 1: the label -1 is out of range"),
        (
            {"labels": (0, None, 1, 0), "names": None},
            r"row 1: the label -1 is out of range, expected 0 or more",
        ),
        ({"labels": ()}, "train-0.parquet has no rows"),
        (
            {"image": [{"bytes": b"bad", "path": ""}] * 4},
            r"cannot read the image .*train-0.parquet, row 0 \(",
        ),
        (
            {"image": [{"bytes": None, "path": "a.png"}] * 4},
            r"train-0.parquet, row 0 \(.*No such file.*a\.png",
        ),
    ],
)
def test_wrong_files_are_named(write, columns, message):
    write("val-0.parquet")
    root = write("train-0.parquet", **columns)
    with pytest.raises(UserError, match=message) as caught:
        open_data(f"parquet:{root}")
    assert "\n" not in str(caught.value)


def test_columns_by_name(write, encoded, picture):
    for name in ("train-0.parquet", "val-0.parquet"):
        sides = {
            side: [encoded(seed + i) for i in range(4)]
            for side, seed in (("left", 20), ("right", 30))
        }
        root = write(
            name, image=None, label=None, names=None, coarse=[0] * 4, fine=["x", "y"] * 2, **sides
        )
    data = open_data(f"parquet:{root}#image=right,label=fine")
    assert data.classes == ("x", "y") and data.train.labels.tolist() == [0, 1, 0, 1]
    assert np.array_equal(data.val.images[3].numpy(), np.asarray(picture(seed=33)))
    assert open_data(f"parquet:{root}#image=left,label=coarse").classes == ("0",)
    with pytest.raises(UserError, match="no image column 'rihgt' .*did you mean right"):
        open_data(f"parquet:{root}#image=rihgt,label=fine")
    with pytest.raises(UserError, match="no label column 'fin' .*did you mean fine"):
        open_data(f"parquet:{root}#image=left,label=fin")


def test_a_folder_for_each_part(write):
    root = write("train-0.parquet")
    write("val-0.parquet", labels=(2, 1))
    for part in ("train", "val"):
        (root / part).mkdir()
        (root / f"{part}-0.parquet").rename(root / part / "0000.parquet")
    assert len(open_data(f"parquet:{root}").val) == 2
    (root / "train" / "0000.parquet").rename(root / "some.parquet")
    (root / "val" / "0000.parquet").unlink()
    with pytest.raises(UserError, match="holds some.parquet but no train-"):
        open_data(f"parquet:{root}")


def test_the_whole_disk_is_not_searched_for_tables(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "some.parquet").touch()
    with pytest.raises(UserError, match="holds no train-"):
        open_data(f"parquet:{tmp_path}")
    with pytest.raises(UserError, match="holds b/some.parquet but no train-"):
        open_data(f"parquet:{tmp_path / 'a'}")


def test_classes_without_images_are_said(write):
    write("train-0.parquet", labels=(0, 5), names=None)
    root = write("val-0.parquet", labels=(0,), names=None)
    said = ("warning: 4 of 6 classes have no training image: 1, 2, 3, …",)
    assert open_data(f"parquet:{root}").notes == said
    assert (
        open_data(f"parquet:{root}", limit_train=1).notes == said
    )  # of the data, not of a part of it


@pytest.mark.parametrize("column", ["image", "label"])
def test_a_damaged_column_is_named(write, column):
    write("val-0.parquet")
    root = write("train-0.parquet", group=99)
    file = root / "train-0.parquet"
    chunk = pq.ParquetFile(file).metadata.row_group(0).column(0 if column == "image" else -1 + 3)
    data = bytearray(file.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"cannot read (the image )?.*train-0\.parquet"):
        open_data(f"parquet:{root}")


def test_val_must_agree_with_train(write):
    write("train-0.parquet", names=None)
    root = write("val-0.parquet", labels=(0, 5), names=None)
    with pytest.raises(
        UserError, match=r"val-0.parquet, row 1: the label 5 is out of range, expected 0 to 2"
    ):
        open_data(f"parquet:{root}")
    write("val-0.parquet", label=["x"] * 4, names=None)
    with pytest.raises(UserError, match="no column 'label' of the same kind as train"):
        open_data(f"parquet:{root}")


def test_bad_rows_are_skipped_and_counted(write, encoded):
    images = [
        {"bytes": blob, "path": None} for blob in (encoded(0), b"bad", encoded(2), encoded(3)[:50])
    ]
    write("train-0.parquet", image=images)
    root = write("val-0.parquet")
    data = open_data(f"parquet:{root}", on_bad_image="skip")
    assert data.skipped == 2 and data.train.labels.tolist() == [0, 2]
    assert data.train.files == ("train-0.parquet:0", "train-0.parquet:2")


def test_missing_and_damaged_files(write, tmp_path):
    with pytest.raises(UserError, match="holds no train-"):
        open_data(f"parquet:{tmp_path}")
    root = write("train-0.parquet", labels=[0, 1] * 10)
    assert len(open_data(f"parquet:{root}").val) == 2
    assert len(open_data(f"parquet:{root}", val_split=0.2).val) == 4
    whole = (root / "train-0.parquet").read_bytes()
    (root / "train-0.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        UserError, match="cannot read .*train-0.parquet .*expected a whole parquet file"
    ):
        open_data(f"parquet:{root}")


def test_streamed_images_are_shuffled_over_all_files(write):
    write("train-0.parquet", labels=[i % 3 for i in range(24)], group=3)
    write("train-1.parquet", first_seed=30)
    root = write("val-0.parquet")
    data = open_data(f"parquet:{root}", stream="on", workers=2)
    resident = open_data(f"parquet:{root}")
    assert data.mean == resident.mean and data.std == resident.std
    stream = Stream(data.train, make_transform(AugmentOptions(crop_padding=0, flip=False), 8))
    plan = stream.epoch(0, 0, 6)
    assert plan.order.tolist() == torch.randperm(28, generator=make_generator(0, 0)).tolist()
    for step in range(len(plan)):
        x, y, _ = stream.batch(plan, step)
        chosen = plan.order[6 * step : 6 * step + 6]
        assert torch.equal(x, resident.train.batch(chosen))
        assert torch.equal(y, resident.train.labels[chosen])


def test_readers_can_be_sent_to_another_process(write):
    root = write("train-0.parquet")
    write("val-0.parquet")
    reader = open_data(f"parquet:{root}", stream="on").train.reader
    copy = pickle.loads(pickle.dumps(reader))
    assert [copy.encoded(i) for i in range(4)] == [reader.encoded(i) for i in range(4)]


@pytest.mark.parametrize("image_storage", ["copied"], indirect=True)
def test_large_sets_are_copied_once_and_again_when_files_change(
    write, image_storage, picture, capfd, monkeypatch
):
    root = write("train-0.parquet").rename(write("val-0.parquet").with_name("a[b]*"))
    open_data(f"parquet:{root}")
    told = capfd.readouterr()
    assert told.out == ""
    cache = datasets.config.HF_DATASETS_CACHE
    assert told.err.count(f"copying the images of {root} to {cache}") == 2
    assert len(told.err.splitlines()) == 2, "no progress bars"
    monkeypatch.setattr(socket, "socket", None)  # neither the network
    open_data(f"parquet:{root}")
    assert capfd.readouterr() == ("", "")
    write("train-0.parquet", first_seed=70).joinpath("train-0.parquet").rename(
        root / "train-0.parquet"
    )
    data = open_data(f"parquet:{root}")
    assert np.array_equal(data.train.images[0].numpy(), np.asarray(picture(seed=70)))


def test_small_sets_are_not_copied(write, image_storage, capfd):
    root = write("train-0.parquet", labels=[0, 1] * 10)
    open_data(f"parquet:{root}")
    assert ("copying the images" in capfd.readouterr().err) == (image_storage == "copied")


@pytest.mark.parametrize("image_storage", ["copied"], indirect=True)
def test_no_room_for_the_copy_is_named(write, image_storage, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    root = write("train-0.parquet")
    monkeypatch.setattr("datasets.load_dataset_builder", fail)
    with pytest.raises(UserError, match=r"cannot copy .*No space left.*HF_DATASETS_CACHE$"):
        open_data(f"parquet:{root}")


def copy_in_another_process(root, barrier):
    tables.IN_MEMORY_BYTES = 0
    barrier.wait()
    assert open_data(f"parquet:{root}").train.labels.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("image_storage", ["copied"], indirect=True)
def test_two_processes_copy_at_once(write, image_storage):
    root = write("train-0.parquet")
    write("val-0.parquet")
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [
        context.Process(target=copy_in_another_process, args=(root, barrier)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
