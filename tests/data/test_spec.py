"""Missing paths, columns by name, class names that several folders share."""

import pytest

from attention_transfer.data.open import open_data
from attention_transfer.data.shards import find_shards
from attention_transfer.data.spec import nearest_path, split_columns, unique_names
from attention_transfer.data.tables import split_files
from attention_transfer.errors import UserError


@pytest.mark.parametrize(
    ("wrong", "right"), [("pest", "pets"), ("pets/tran", "pets/train"), ("pest/val", "pets/val")]
)
@pytest.mark.parametrize("kind", ["folder", "parquet", "wds", "cifar10"])
def test_the_nearest_path_is_named(make_folder, kind, wrong, right):
    root = make_folder().parent
    with pytest.raises(UserError, match="does not exist") as caught:
        open_data(f"{kind}:{root / wrong}")
    assert str(caught.value).endswith(f"; did you mean {root / right}?")


def test_nothing_near_is_not_named(tmp_path):
    (tmp_path / "pets").mkdir()
    assert nearest_path(tmp_path / "zebra") == "" and nearest_path(tmp_path / "pets") == ""


def test_columns_after_the_path(tmp_path):
    assert split_columns("", "a/b") == ("a/b", {})
    assert split_columns("", "a#image=x y,label=z") == ("a", {"image": "x y", "label": "z"})
    (tmp_path / "a#b").mkdir()
    assert split_columns("", str(tmp_path / "a#b")) == (str(tmp_path / "a#b"), {})
    for words in ("lable=z", "label", "label=", ""):
        with pytest.raises(
            UserError, match="names no column: expected image=COLUMN or label=COLUMN"
        ):
            split_columns("", f"a#{words}")
    with pytest.raises(UserError, match="did you mean label"):
        split_columns("", "a#lable=z")


def test_shared_names_are_told_apart(make_folder):
    assert unique_names(["crane", "kite", "crane"], ["n2", "n1", "n3"]) == (
        "crane (n2)",
        "kite",
        "crane (n3)",
    )
    root = make_folder()
    (root / "classes.csv").write_text("cat,pet\ndog,pet\n")
    assert open_data(f"folder:{root}").classes == ("pet (cat)", "pet (dog)")


@pytest.mark.parametrize("name", ["classes.csv", "boxes.csv"])
def test_a_table_that_is_no_text(make_folder, name):
    root = make_folder()
    (root / name).write_bytes(b"\xff\xfecat,\x00\n")
    with pytest.raises(UserError, match=rf"cannot read .*{name} \(.*expected CSV in UTF-8"):
        open_data(f"folder:{root}")


def test_hidden_files_are_no_images(make_folder):
    root = make_folder(train=3)
    (root / "train" / "cat" / "._0.png").write_bytes(b"of the system")
    (root / "train" / "cat" / ".thumbs").mkdir()
    (root / "train" / "cat" / ".thumbs" / "0.png").write_bytes(b"of the system")
    assert len(open_data(f"folder:{root}").train) == 6


def test_hidden_files_are_no_shards_or_tables(tmp_path):
    """`visible_files` serves all kinds of data; Path.glob's * takes a leading dot."""
    for name in ("train-0.tar", "._train-0.tar", "train/0.parquet", "train/._0.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_shards(str(tmp_path)) == ([tmp_path / "train-0.tar"], [])
    assert split_files(tmp_path, "train") == [tmp_path / "train" / "0.parquet"]


def test_files_where_folders_should_be(make_folder):
    root = make_folder()
    for folder in (root / "train").iterdir():
        for file in folder.iterdir():
            file.rename(root / "train" / f"{folder.name}{file.name}")
        folder.rmdir()
    with pytest.raises(
        UserError, match="train has files but no folders: expected a folder of images for each"
    ):
        open_data(f"folder:{root}")
