import pytest
import torch

import attention_transfer.data.open as opening
from attention_transfer.data import decode, shards
from attention_transfer.data.open import open_data, prepare_data
from attention_transfer.data.options import DataOptions
from attention_transfer.errors import UserError


def test_limits_are_balanced_and_seeded():
    data = open_data("digits", limit_train=105, limit_val=20, seed=1)
    counts = torch.bincount(data.train.labels)
    assert len(data.train) == 105 and counts.min() == 10 and counts.max() == 11
    assert torch.bincount(data.val.labels).tolist() == [2] * 10
    again = open_data("digits", limit_train=105, limit_val=20, seed=1)
    other = open_data("digits", limit_train=105, limit_val=20, seed=2)
    assert torch.equal(data.train.images, again.train.images)
    assert not torch.equal(data.train.images, other.train.images)


def test_a_limit_above_the_set_takes_it_all():
    data = open_data("digits", limit_train=10**6, limit_val=10**6)
    assert (len(data.train), len(data.val)) == (12000, 2000)


def test_val_split_cuts_from_the_training_images():
    whole = open_data("digits", limit_val=1)
    data = open_data("digits", val_split=0.25)
    assert torch.bincount(data.val.labels).tolist() == [300] * 10 and len(data.train) == 9000
    of_train = {image.numpy().tobytes() for image in whole.train.images}
    parts = [{image.numpy().tobytes() for image in part.images} for part in (data.train, data.val)]
    assert parts[0] | parts[1] == of_train and not parts[0] & parts[1]
    assert not torch.equal(open_data("digits", val_split=0.25, seed=1).val.images, data.val.images)


def test_statistics_are_those_of_the_training_images():
    data = open_data("digits", limit_train=50, limit_val=10)
    pixels = data.train.images.double().view(-1, 3) / 255
    torch.testing.assert_close(torch.tensor(data.mean).double(), pixels.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        torch.tensor(data.std).double(), pixels.std(0, correction=0), rtol=1e-6, atol=0
    )
    assert data.spec == "digits" and data.skipped == 0


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (
            "digit",
            {},
            r"unknown data 'digit': expected one of digits, cifar10\[.*did you mean digits\?",
        ),
        ("cifar", {}, r"did you mean cifar10 or cifar100\?"),
        ("", {}, "unknown data ''"),
        ("digits:here", {}, "digits is built in and takes no folder"),
        ("folder", {}, "lacks a path or name: expected folder:PATH"),
        ("parquet:", {}, "lacks a path or name: expected parquet:PATH"),
        ("wds:", {}, "lacks a path or name: expected wds:PATTERN"),
        ("hub", {}, "lacks a path or name: expected hub:OWNER/NAME"),
        (
            "digits",
            {"stream": "of"},
            "stream is 'of': expected one of auto, on, off; did you mean off",
        ),
        ("folder:/no/such/place", {}, "/no/such/place does not exist; expected the data's folder"),
        (
            "cifar10:/no/such/place",
            {},
            "/no/such/place does not exist; expected the folder that holds cifar10",
        ),
        (
            "digits",
            {"on_bad_image": "skp"},
            "on_bad_image is 'skp': expected one of error, skip; did you mean skip",
        ),
        ("digits", {"image_size": 0}, "image_size is 0: expected a whole number ≥ 1"),
        ("digits", {"image_size": 2.5}, "image_size is 2.5: expected a whole number ≥ 1"),
        ("digits", {"limit_train": 0}, "limit_train is 0: expected a whole number ≥ 1"),
        ("digits", {"limit_val": -3}, "limit_val is -3: expected a whole number ≥ 1"),
        (
            "digits",
            {"val_split": 0.0},
            "val_split is 0.0: expected a number > 0 and < 1",
        ),
        ("digits", {"val_split": 1}, "val_split is 1: expected a number > 0 and < 1"),
    ],
)
def test_wrong_words_are_named_on_one_line(spec, options, message):
    with pytest.raises(UserError, match=message) as caught:
        open_data(spec, **options)
    assert "\n" not in str(caught.value)


def test_a_bare_folder_is_recognised(tmp_path):
    with pytest.raises(UserError, match=f"did you mean folder:{tmp_path}"):
        open_data(str(tmp_path))


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is not a folder"):
        open_data(f"parquet:{tmp_path / 'file'}")


def test_too_large_a_set_is_refused_before_decoding(make_folder, monkeypatch):
    root = make_folder()
    monkeypatch.setattr("attention_transfer.data.decode.available_memory", lambda: 10**6)
    monkeypatch.setattr(
        "attention_transfer.data.stream.decode_into", lambda *_: pytest.fail("decoded")
    )
    with pytest.raises(
        UserError, match=r"12 images of 224x224 take 0.00 GiB.*lower image_size.*--stream on"
    ):
        open_data(f"folder:{root}", image_size=224, stream="off")


def test_what_does_not_fit_is_streamed(make_folder, monkeypatch):
    root = make_folder()
    size = 12 * 224 * 224 * 3
    assert open_data(f"folder:{root}", image_size=224, memory=size - 1).streamed
    assert not open_data(f"folder:{root}", image_size=224, memory=size).streamed
    monkeypatch.setattr("attention_transfer.data.decode.available_memory", lambda: 10**6)
    assert open_data(f"folder:{root}", image_size=224).streamed
    assert (
        open_data(f"folder:{root}", stream="on").streamed
        and not open_data(f"folder:{root}").streamed
    )


def test_what_is_in_memory_anyway_cannot_be_streamed():
    with pytest.raises(UserError, match="digits is read into memory as a whole and"):
        open_data("digits", stream="on")


def test_known_specs_open_themselves():
    assert [spec.partition(":")[0].partition("[")[0] for spec in opening.DATA_SPECS] == [
        "digits", "cifar10", "cifar100", "folder", "parquet", "wds", "hub"
    ]  # fmt: skip


def test_options_as_one_object(make_folder):
    options = DataOptions(f"folder:{make_folder()}", limit_train=3, stream="on", workers=None)
    data = open_data(options, limit_val=2)
    assert (len(data.train), len(data.val), data.train.workers) == (3, 2, 0)
    with pytest.raises(UserError, match="unknown option 'limit_trian'; did you mean limit_train"):
        open_data(options, limit_trian=2)


def test_data_is_downloaded_before_several_processes_open_it(monkeypatch):
    downloads = []
    monkeypatch.setattr("attention_transfer.data.cifar.download", downloads.append)
    monkeypatch.setattr("attention_transfer.data.shards.find_shards", downloads.append)
    for spec in ("cifar10", "cifar100:FOLDER", "digits", "wds:http://a/{0..1}.tar", "hub:a/b"):
        prepare_data(spec)
    assert downloads == ["cifar10", "http://a/{0..1}.tar"]


def test_files_in_the_cache_are_free_memory(monkeypatch, tmp_path):
    """A container counts the files that it has read as used."""
    gib = 2**30
    group = {"memory.max": 8 * gib, "memory.current": 7 * gib}
    for name, value in group.items():
        (tmp_path / name).write_text(f"{value}\n")
    stat = f"anon {gib}\nactive_file {2 * gib}\ninactive_file {3 * gib}\nslab 5\n"
    (tmp_path / "memory.stat").write_text(stat)
    monkeypatch.setattr(decode, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(decode, "MEMORY_FILE", tmp_path / "none")
    assert decode.available_memory() == 6 * gib


def test_a_shard_is_downloaded_once(monkeypatch, tmp_path):
    """Another process finishes while this one waits for the lock."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    class Waiting:
        def __init__(self, file):
            self.folder = file.parent

        def __enter__(self):
            (self.folder / "a.tar").write_bytes(b"whole")

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(shards, "FileLock", Waiting)
    train, _ = shards.find_shards("http://127.0.0.1:9/a.tar")
    assert train[0].read_bytes() == b"whole"
