import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from attention_transfer.data.open import open_data
from attention_transfer.errors import UserError


def test_classes_labels_and_pixels(make_folder):
    root = make_folder()
    data = open_data(f"folder:{root}")
    assert data.classes == ("cat", "dog") and data.image_size == (8, 8)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 and len(data.val) == 4
    assert data.train.boxes is None and data.train.files[5] == "train/dog/1.png"
    for i, file in enumerate(data.train.files):
        assert np.array_equal(data.train.images[i].numpy(), np.asarray(Image.open(root / file)))


def test_matches_torchvision(make_folder, picture):
    from torchvision.datasets import ImageFolder

    root = make_folder()
    (root / "train" / "cat" / "nested" / "deep").mkdir(parents=True)
    picture(seed=77).save(root / "train" / "cat" / "nested" / "deep" / "A.PNG")
    (root / "train" / "cat" / "notes.txt").write_text("not an image")
    theirs, ours = ImageFolder(str(root / "train")), open_data(f"folder:{root}").train
    assert tuple(theirs.classes) == ours.classes and len(theirs) == len(ours)
    expected = {
        (str(root / file), label)
        for file, label in zip(ours.files, ours.labels.tolist(), strict=True)
    }
    assert set(theirs.samples) == expected


def test_limits_decode_only_what_is_wanted(make_folder):
    root = make_folder()
    (root / "train" / "cat" / "0.png").write_bytes(b"bad")
    data = open_data(
        f"folder:{root}", limit_train=4, seed=next(s for s in range(99) if 0 not in picks(s))
    )
    assert (
        torch.bincount(data.train.labels).tolist() == [2, 2]
        and "train/cat/0.png" not in data.train.files
    )


def picks(seed):
    from attention_transfer.data.images import balanced_subset

    return balanced_subset(torch.tensor([0] * 4 + [1] * 4), 4, seed).tolist()


def test_mixed_sizes_are_resized_and_cropped(make_folder, picture):
    root = make_folder()
    picture(20, 10).save(root / "train" / "cat" / "0.png")
    assert open_data(f"folder:{root}").image_size == (64, 64)
    data = open_data(f"folder:{root}", image_size=6)
    expected = picture(20, 10).resize((12, 6), Image.Resampling.BILINEAR).crop((3, 0, 9, 6))
    assert np.array_equal(data.train.images[0].numpy(), np.asarray(expected))


def test_readable_names_and_boxes(make_folder, picture):
    root = make_folder()
    (root / "classes.csv").write_text('wnid,name\ndog,"dog, domestic dog"\n')
    picture(20, 10).save(root / "train" / "cat" / "0.png")
    (root / "boxes.csv").write_text(
        "file,x_min,y_min,x_max,y_max\ntrain/cat/0.png,0,0,19,9\ntrain/cat/1.png,2,3,4,7\nval/dog/1.png,0,0,7,7\n"
    )
    data = open_data(f"folder:{root}", image_size=8)
    assert data.classes == ("cat", "dog, domestic dog")
    assert data.train.boxes[:3].tolist() == [[0, 0, 8, 8], [2, 3, 5, 8], [0, 0, 0, 0]]
    assert data.val.boxes.tolist() == [[0, 0, 0, 0]] * 3 + [[0, 0, 8, 8]]


@pytest.mark.parametrize(
    "text", ["file,x_min\n", "file,x_min,y_min,x_max,y_max\na.png,1,2,x,4\n", "", "a,1\n"]
)
def test_wrong_boxes_are_named(make_folder, text):
    root = make_folder()
    (root / "boxes.csv").write_text(text)
    with pytest.raises(UserError, match=r"boxes.csv(, line 2: expected| lacks the column)"):
        open_data(f"folder:{root}")


def test_a_bad_image_is_named_with_its_path_or_skipped(make_folder):
    root = make_folder()
    bad = root / "train" / "dog" / "2.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(UserError, match=f"cannot read the image {bad} ") as caught:
        open_data(f"folder:{root}")
    assert "\n" not in str(caught.value)
    data = open_data(f"folder:{root}", on_bad_image="skip")
    assert data.skipped == 1 and data.train.labels.tolist() == [0] * 4 + [1] * 3
    assert "train/dog/2.png" not in data.train.files and len(data.train.files) == 7


def test_only_bad_images_is_an_error_even_when_skipping(make_folder):
    root = make_folder(train=1)
    for file in (root / "train").rglob("*.png"):
        file.write_bytes(b"bad")
    with pytest.raises(UserError, match="none of the 2 training images can be read"):
        open_data(f"folder:{root}", on_bad_image="skip")


def test_a_missing_val_may_be_cut_from_train(make_folder):
    root = make_folder(train=10)
    shutil.rmtree(root / "val")
    data = open_data(f"folder:{root}", val_split=0.2)
    assert data.notes == ()
    assert torch.bincount(data.val.labels).tolist() == [2, 2] and len(data.train) == 16
    assert not set(data.train.files) & set(data.val.files)


def test_a_missing_val_is_cut_from_train_for_every_seed_alike(make_folder):
    root = make_folder(train=20)
    shutil.rmtree(root / "val")
    data = open_data(f"folder:{root}", seed=1)
    assert torch.bincount(data.val.labels).tolist() == [2, 2] and torch.bincount(
        data.train.labels
    ).tolist() == [18, 18]
    assert not set(data.train.files) & set(data.val.files)
    assert open_data(f"folder:{root}", seed=2).val.files == data.val.files
    (note,) = data.notes
    assert (
        "has no validation images: 4 of its 40 training images (10% of each class" in note
        and "--val-split" in note
    )


def test_classes_directly_in_the_folder(make_folder):
    root = make_folder(train=10)
    shutil.rmtree(root / "val")
    data = open_data(f"folder:{root / 'train'}")
    assert data.classes == ("cat", "dog") and len(data.train) == 18 and len(data.val) == 2
    assert data.val.files[0].startswith("cat/")


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_other_names_of_val(make_folder, name):
    root = make_folder()
    (root / "val").rename(root / name)
    data = open_data(f"folder:{root}")
    assert data.notes == () and data.val.files[0] == f"{name}/cat/0.png" and len(data.train) == 8


def test_a_class_of_one_image_is_trained_on(make_folder):
    root = make_folder(train=10)
    shutil.rmtree(root / "val")
    for i in range(1, 10):
        (root / "train" / "dog" / f"{i}.png").unlink()
    data = open_data(f"folder:{root}")
    assert torch.bincount(data.train.labels).tolist() == [9, 1] and data.val.labels.tolist() == [0]
    assert (
        data.notes[1]
        == "warning: 1 class has a single image, which is used for training, not for validation"
    )


def test_val_split_needs_images_to_cut(make_folder):
    with pytest.raises(UserError, match="val_split needs a class with at least 2"):
        open_data(f"folder:{make_folder(train=1)}", val_split=0.5)


def remove(*parts):
    return lambda root: shutil.rmtree(root.joinpath(*parts))


def empty(*parts):
    def change(root):
        shutil.rmtree(root.joinpath(*parts))
        root.joinpath(*parts).mkdir()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("train"), "has no folder train/: expected train/ and val/"),
        (empty("train"), "train is empty: expected a folder of images for each class"),
        (empty("val"), "val is empty"),
        (remove("val", "cat"), "val lacks the class folder 'cat' of train/"),
        (remove("train", "cat"), "train lacks the class folder 'cat' of val/"),
        (
            empty("train", "cat"),
            "the class folder .*cat has no images: expected files ending in .bmp",
        ),
        (empty("val", "dog"), "the class folder .*val/dog has no images"),
    ],
)
def test_wrong_folders_are_named(make_folder, change, message):
    root = make_folder()
    change(root)
    with pytest.raises(UserError, match=message) as caught:
        open_data(f"folder:{root}")
    assert "\n" not in str(caught.value) and str(root) in str(caught.value)
