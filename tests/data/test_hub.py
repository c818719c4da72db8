"""`hub:` against a stand-in for Hugging Face's library, with the few of its names that are used."""

import io
import sys
import types

import numpy as np
import pytest

from attention_transfer.data import open_data
from attention_transfer.errors import UserError


class Image:
    dtype = "PIL.Image.Image"

    def __init__(self, decode=True):
        self.decode = decode


class ClassLabel:
    dtype = "int64"

    def __init__(self, names):
        self.names = names


class Value:
    def __init__(self, dtype):
        self.dtype = dtype


class Part:
    """Rows as columns; an Image column gives encoded bytes only once it was cast to do so."""

    def __init__(self, features, columns):
        self.features, self.columns = features, columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        for feature in self.features.values():
            assert getattr(feature, "decode", False) is False, "decoded by the library"
        return {name: values[key] for name, values in self.columns.items()}

    def with_format(self, kind):
        assert kind is None
        return self

    def select_columns(self, names):
        return Part({n: self.features[n] for n in names}, {n: self.columns[n] for n in names})

    def cast_column(self, name, feature):
        return Part(self.features | {name: feature}, self.columns)


@pytest.fixture
def hub(monkeypatch, picture):
    """Puts data sets on the hub: {name: {part: (features, labels)}}."""
    library = types.ModuleType("datasets")
    library.Image = Image
    there, asked = {}, []

    def load_dataset(name, configuration=None):
        asked.append((name, configuration))
        if name not in there:
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub\nTraceback and more")
        return there[name]

    library.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", library)

    def encoded(seed):
        stream = io.BytesIO()
        picture(seed=seed).save(stream, "PNG")
        return {"bytes": stream.getvalue(), "path": None}

    def put(name, label, parts, image="image", column="label", **others):
        there[name] = {}
        for part, labels in parts.items():
            features = {image: Image(), column: label, **{k: v for k, (v, _) in others.items()}}
            columns = {image: [encoded(i) for i in range(len(labels))], column: list(labels)}
            columns |= {k: values * len(labels) for k, (_, values) in others.items()}
            there[name][part] = Part(features, columns)

    put.asked = asked
    return put


@pytest.mark.parametrize("stream", ["on", "off"])
def test_images_labels_and_names(hub, picture, stream):
    hub(
        "me/pets",
        ClassLabel(["cat", "dog"]),
        {"train": [0, 1, 1], "test": [1]},
        image="img",
        column="species",
    )
    data = open_data("hub:me/pets", stream=stream)
    assert data.classes == ("cat", "dog") and data.train.labels.tolist() == [0, 1, 1]
    assert np.array_equal(
        data.train.batch([2])[0].permute(1, 2, 0).numpy(), np.asarray(picture(seed=2))
    )
    assert len(data.val) == 1 and hub.asked == [("me/pets", None)]


def test_validation_goes_before_test_and_is_cut_off_where_there_is_none(hub):
    hub("a/b", ClassLabel(["x", "y"]), {"train": [0, 1] * 10, "test": [0] * 3, "validation": [1]})
    assert open_data("hub:a/b:small").val.labels.tolist() == [1] and hub.asked == [("a/b", "small")]
    hub("a/b", ClassLabel(["x", "y"]), {"all": [0, 1] * 10})
    data = open_data("hub:a/b")
    assert len(data.val) == 2 and "has no validation images" in data.notes[0]


def test_words_and_numbers_as_labels(hub):
    hub("a/b", Value("string"), {"train": ["b", "a"], "test": ["a"]}, id=(Value("int64"), [7]))
    data = open_data("hub:a/b")
    assert data.classes == ("a", "b") and data.train.labels.tolist() == [1, 0]
    hub("a/b", Value("uint8"), {"train": [0, 2], "test": [1]}, column="kind")
    assert open_data("hub:a/b").classes == ("0", "1", "2")


def test_columns_by_name(hub):
    hub(
        "a/b",
        Value("int64"),
        {"train": [0, 1], "test": [1]},
        column="fine",
        coarse=(Value("int64"), [3]),
    )
    with pytest.raises(UserError, match=r"surely the label .*hub:a/b#label=COLUMN"):
        open_data("hub:a/b")
    assert open_data("hub:a/b#label=fine").train.labels.tolist() == [0, 1]
    assert open_data("hub:a/b#label=coarse,image=image").classes == ("0", "1", "2", "3")
    with pytest.raises(UserError, match="no label column 'fien' .*did you mean fine"):
        open_data("hub:a/b#label=fien")


def test_a_bad_row_is_named(hub):
    hub("a/b", ClassLabel(["x"]), {"train": [0, -1], "test": [0]})
    with pytest.raises(UserError, match="hub:a/b, train, row 1: the label -1 is out of range"):
        open_data("hub:a/b")


def test_columns_that_are_not_there(hub):
    hub("a/b", Value("float32"), {"train": [0.5], "test": [0.5]})
    with pytest.raises(
        UserError,
        match=r"no column that is surely the label \(its columns: image .*, label \(float32\)",
    ):
        open_data("hub:a/b")
    library = sys.modules["datasets"].load_dataset("a/b")
    library["train"] = Part({"text": Value("string")}, {"text": ["a"]})
    with pytest.raises(
        UserError, match=r"hub:a/b has no image column \(its columns: text \(string\)\)"
    ):
        open_data("hub:a/b")


def test_no_such_data_set_or_no_network(hub):
    with pytest.raises(
        UserError, match=r"cannot fetch no/such from the Hugging Face hub \(Couldn't reach"
    ) as caught:
        open_data("hub:no/such")
    assert "\n" not in str(caught.value) and "check the name and the network" in str(caught.value)


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'attention-transfer\[hub\]'"):
        open_data("hub:a/b")
