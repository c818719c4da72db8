"""`hub:` with data sets that are made here in place of downloaded ones."""

import io

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Image, Value

from attention_transfer.data.open import open_data
from attention_transfer.errors import UserError


@pytest.fixture
def hub(monkeypatch, picture):
    """Puts data sets on the hub: {name: {split: labels}}."""
    stored, asked = {}, []

    def load_dataset(name, configuration=None):
        asked.append((name, configuration))
        if name not in stored:
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub\nTraceback and more")
        return datasets.DatasetDict(stored[name])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    def encoded(seed):
        stream = io.BytesIO()
        picture(seed=seed).save(stream, "PNG")
        return {"bytes": stream.getvalue(), "path": None}

    def put(name, label, splits, image="image", column="label", **others):
        stored[name] = {}
        for split, labels in splits.items():
            features = {image: Image(), column: label, **{k: v for k, (v, _) in others.items()}}
            columns = {image: [encoded(i) for i in range(len(labels))], column: list(labels)}
            columns |= {k: values * len(labels) for k, (_, values) in others.items()}
            stored[name][split] = datasets.Dataset.from_dict(columns, datasets.Features(features))

    put.asked, put.stored = asked, stored
    return put


@pytest.mark.parametrize("place", ["/data/pets", "../pets", "me/pets/more", "./pets", "~/pets"])
def test_a_path_is_no_name_of_the_hub(hub, place):
    with pytest.raises(UserError, match="is not the name of a data set: expected OWNER/NAME; for"):
        open_data(f"hub:{place}")
    assert not hub.asked


@pytest.mark.parametrize("stream", ["on", "off"])
def test_images_labels_and_names(hub, picture, stream):
    hub(
        "me/pets",
        ClassLabel(names=["cat", "dog"]),
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
    splits = {"train": [0, 1] * 10, "test": [0] * 3, "validation": [1]}
    hub("a/b", ClassLabel(names=["x", "y"]), splits)
    assert open_data("hub:a/b:small").val.labels.tolist() == [1] and hub.asked == [("a/b", "small")]
    hub("a/b", ClassLabel(names=["x", "y"]), {"all": [0, 1] * 10})
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
    with pytest.raises(
        UserError, match=r"several label columns \(fine, coarse\).*hub:a/b#label=fine"
    ):
        open_data("hub:a/b")
    assert open_data("hub:a/b#label=fine").train.labels.tolist() == [0, 1]
    assert open_data("hub:a/b#label=coarse,image=image").classes == ("0", "1", "2", "3")
    with pytest.raises(UserError, match="no label column 'fien' .*did you mean fine"):
        open_data("hub:a/b#label=fien")


def test_a_bad_row_is_named(hub):
    hub("a/b", ClassLabel(names=["x"]), {"train": [0, -1], "test": [0]})
    with pytest.raises(UserError, match="hub:a/b/train, row 1: the label -1 is out of range"):
        open_data("hub:a/b")


def test_columns_that_are_not_there(hub):
    hub("a/b", Value("float32"), {"train": [0.5], "test": [0.5]})
    with pytest.raises(
        UserError, match=r"has no label column \(its columns: image .*, label \(float\)\)"
    ):
        open_data("hub:a/b")
    hub.stored["a/b"] = {"train": datasets.Dataset.from_dict({"text": ["a"]})}
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
