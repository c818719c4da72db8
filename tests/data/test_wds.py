import io
import json
import tarfile

import numpy as np
import pytest

from attention_transfer.data.open import open_data
from attention_transfer.data.shards import expand_braces
from attention_transfer.errors import UserError


def png(picture, seed):
    stream = io.BytesIO()
    picture(seed=seed).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def shard(tmp_path, picture):
    """Writes a shard of samples {extension: content}, by default an image and its class."""

    def make(name, labels=(0, 1, 2), first_seed=0, samples=None):
        samples = samples or [
            {"png": png(picture, first_seed + i), "cls": str(label).encode()}
            for i, label in enumerate(labels)
        ]
        folder = tmp_path / "shards"
        folder.mkdir(exist_ok=True)
        with tarfile.open(folder / name, "w") as tar:
            for i, sample in enumerate(samples):
                for extension, content in sample.items():
                    about = tarfile.TarInfo(f"./part/{i:04}.{extension}")
                    about.size = len(content)
                    tar.addfile(about, io.BytesIO(content))
        return folder

    return make


def test_a_folder_of_shards(shard, picture):
    shard("train-000.tar")
    shard("train-001.tar", labels=(2, 0), first_seed=3)
    root = shard("val-000.tar", labels=(1,), first_seed=9)
    data = open_data(f"wds:{root}")
    assert data.classes == ("0", "1", "2") and data.train.labels.tolist() == [0, 1, 2, 2, 0]
    for seed in range(5):
        assert np.array_equal(data.train.images[seed].numpy(), np.asarray(picture(seed=seed)))
    assert np.array_equal(data.val.images[0].numpy(), np.asarray(picture(seed=9)))
    assert data.train.files[3] == "train-001.tar:./part/0000"
    (root / "classes.txt").write_text("ant\nbee\ncat\n")
    assert open_data(f"wds:{root}").classes == ("ant", "bee", "cat")


@pytest.mark.parametrize(
    "pattern", ["{train,test}-{000..001}.tar", "{train,test}-*.tar", "{test,train}-00[01].tar"]
)
def test_patterns_name_both_parts(shard, pattern):
    for part, first in (("train", 0), ("test", 5)):
        shard(f"{part}-000.tar", first_seed=first)
        root = shard(f"{part}-001.tar", labels=(1, 0), first_seed=first)
    data = open_data(f"wds:{root}/{pattern}")
    assert len(data.train) == len(data.val) == 5 and data.notes == ()


def test_without_validation_shards_some_are_cut_off(shard):
    root = shard("images-0.tar", labels=[i % 2 for i in range(20)])
    data = open_data(f"wds:{root}/images-{{0..0}}.tar")
    assert len(data.val) == 2 and "has no validation images" in data.notes[0]


def test_braces_are_expanded_as_the_shell_does():
    assert expand_braces("a{1..3}b") == ["a1b", "a2b", "a3b"] and expand_braces("{08..10}") == [
        "08",
        "09",
        "10",
    ]
    assert (
        expand_braces("{a,b}-{0..1}") == ["a-0", "a-1", "b-0", "b-1"]
        and expand_braces("plain") == ["plain"]
        and expand_braces("") == []
    )


def test_labels_in_json_and_as_words(shard, picture):
    about = [{"label": "bee"}, {"cls": "ant"}, {"caption": "?", "class_name": "bee"}]
    samples = [
        {"JPG": png(picture, i), "json": json.dumps(a).encode()} for i, a in enumerate(about)
    ]
    shard("train-0.tar", samples=samples)
    root = shard("val-0.tar", samples=samples[:1])
    data = open_data(f"wds:{root}")
    assert (
        data.classes == ("ant", "bee")
        and data.train.labels.tolist() == [1, 0, 1]
        and data.val.labels.tolist() == [1]
    )


def test_a_class_that_train_lacks_is_named(shard):
    shard("train-0.tar")
    root = shard("val-0.tar", labels=(0, 5))
    with pytest.raises(
        UserError,
        match=r"val-0\.tar, sample \./part/0001: the label 5 is out of range, expected 0 to 2",
    ):
        open_data(f"wds:{root}")


def test_a_word_among_numeric_labels_is_named(shard):
    shard("train-0.tar")
    root = shard("val-0.tar", labels=(0, "cat"))
    message = r"val-0\.tar, sample \./part/0001: the label 'cat' is a word, but the training labels"
    with pytest.raises(UserError, match=message):
        open_data(f"wds:{root}")


@pytest.mark.parametrize("missing", ["png", "cls"])
def test_an_incomplete_sample_is_named_or_skipped(shard, picture, missing):
    samples = [{"png": png(picture, i), "cls": b"%d" % (i % 2)} for i in range(4)]
    del samples[2][missing]
    shard("train-0.tar", samples=samples)
    root = shard("val-0.tar", labels=(0, 1))
    what = "image" if missing == "png" else "label"
    with pytest.raises(
        UserError, match=rf"train-0\.tar, sample \./part/0002, has no {what}"
    ) as caught:
        open_data(f"wds:{root}")
    assert "\n" not in str(caught.value)
    data = open_data(f"wds:{root}", on_bad_image="skip")
    assert data.train.labels.tolist() == [0, 1, 1] and data.skipped == 1


def test_a_bad_image_is_named_by_shard_and_sample(shard, picture):
    samples = [{"png": png(picture, i)[: 60 if i == 1 else None], "cls": b"0"} for i in range(3)]
    shard("train-0.tar", samples=samples)
    root = shard("val-0.tar", labels=(0,))
    for stream in ("on", "off"):
        with pytest.raises(
            UserError, match=r"cannot read the image .*train-0\.tar, sample \./part/0001 "
        ):
            open_data(f"wds:{root}", stream=stream)
    data = open_data(f"wds:{root}", on_bad_image="skip")
    assert len(data.train) == 2 and data.skipped == 1


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_damaged_shard_is_named_or_read_as_far_as_it_goes(shard, keep):
    shard("train-0.tar")
    root = shard("train-1.tar", labels=[0] * 20)
    shard("val-0.tar", labels=(0,))
    file = root / "train-1.tar"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * keep)] if keep else b"no tar file at all" * 100)
    with pytest.raises(
        UserError, match=r"cannot read the shard .*train-1\.tar \(.*fetch it again"
    ) as caught:
        open_data(f"wds:{root}")
    assert "\n" not in str(caught.value)
    data = open_data(f"wds:{root}", on_bad_image="skip")
    assert (
        data.skipped in (1, 2) and 3 <= len(data.train) < 23 and (len(data.train) > 3) == (keep > 0)
    )


def test_a_member_with_an_impossible_size(shard):
    file = shard("train-0.tar") / "train-0.tar"
    content = bytearray(file.read_bytes())
    member = tarfile.TarInfo("huge.jpg")
    member.size = 1 << 62
    content[:512] = member.tobuf(tarfile.GNU_FORMAT)
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"train-0\.tar \(its member huge\.jpg is cut off\)"):
        open_data(f"wds:{file.parent}")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("/no/such/{train,val}-0.tar", "the shard /no/such/train-0.tar does not exist"),
        (":/", "expected all shards of wds::/;"),
        (
            "/no/such/*.tar",
            r"matches no shard: expected a folder with train-\*\.tar, or a pattern",
        ),
        ("s3://bucket/a.tar", r"expected files or http\(s\):// shards; fetch them first"),
        ("pipe:cat a.tar", "fetch them first"),
        (
            "http://127.0.0.1:9/{train,val}-0.tar",
            r"cannot download the shard http://127\.0\.0\.1:9/train-0\.tar \(",
        ),
    ],
)
def test_wrong_places_are_named(place, message, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        open_data(f"wds:{place}")
    assert "\n" not in str(caught.value)


def test_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match="matches no shard"):
        open_data(f"wds:{tmp_path}")


def test_shards_at_a_url_are_fetched_once(shard, tmp_path, monkeypatch):
    import threading
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    shard("train-0.tar")
    root = shard("val-0.tar", labels=(0,))
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        spec = f"wds:http://127.0.0.1:{server.server_port}/{{train,val}}-{{0..0}}.tar"
        data = open_data(spec)
        open_data(spec)
        server.shutdown()
    assert len(data.train) == 3 and len(data.val) == 1 and asked == ["/train-0.tar", "/val-0.tar"]


def test_words_among_numbers_are_said(shard):
    root = shard("train-000.tar", labels=(0, 1, "cat", 1))
    shard("val-000.tar", labels=(0,))
    data = open_data(f"wds:{root}")
    assert data.classes == ("0", "1", "cat") and len(data.notes) == 1
    assert (
        "1 of 4 labels are not whole numbers ('cat' of" in data.notes[0]
        and "0002)" in data.notes[0]
    )
    shard("train-000.tar", labels=("a", "b"))
    shard("val-000.tar", labels=("b",))
    assert open_data(f"wds:{root}").notes == ()


def test_compressed_shards_are_named(shard):
    root = shard("train-000.tar")
    (root / "train-000.tar").rename(root / "train-000.tar.gz")
    with pytest.raises(UserError, match="holds compressed shards only: .*unpack them"):
        open_data(f"wds:{root}")


def test_names_of_classes(shard):
    root = shard("train-000.tar")
    shard("val-000.tar")
    (root / "classes.txt").write_text("crane\nkite\ncrane\n", encoding="utf-8")
    assert open_data(f"wds:{root}").classes == ("crane (0)", "kite", "crane (2)")
    (root / "classes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="classes.txt .*expected UTF-8"):
        open_data(f"wds:{root}")
