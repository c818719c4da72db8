"""Real images, where a copy of them lies beside the repository."""

import shutil
from pathlib import Path

import pytest
import torch

from attention_transfer.data.open import open_data
from attention_transfer.errors import UserError

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def needs(folder):
    return pytest.mark.skipif(
        not (DATA / folder).is_dir(), reason=f"../shared/data/{folder} is not there"
    )


@needs("cifar10")
def test_cifar10_test_set(tmp_path):
    # The test file stands for both splits: the training files would take too long.
    for part in ("train", "test"):
        shutil.copy(
            DATA / "cifar10" / "test-00000-of-00001.parquet",
            tmp_path / f"{part}-00000-of-00001.parquet",
        )
    data = open_data(f"cifar10:{tmp_path}", limit_train=10)
    assert " ".join(data.classes) == "airplane automobile bird cat deer dog frog horse ship truck"
    assert torch.bincount(data.val.labels).tolist() == [1000] * 10 and data.image_size == (32, 32)
    # The published mean of the training set; the test set's is within 0.005 of it.
    assert (data.val.images.view(-1, 3).double().mean(0) / 255).tolist() == pytest.approx(
        data.mean, abs=0.005
    )
    with pytest.raises(UserError, match="no label column 'fine_label'"):
        open_data(f"cifar100:{tmp_path}")


@needs("tiny-imagenet/finegrained")
def test_tiny_imagenet_with_boxes():
    data = open_data(
        f"folder:{DATA / 'tiny-imagenet' / 'finegrained'}", limit_train=100, limit_val=50
    )
    assert len(data.classes) == 10 and "Chihuahua" in data.classes and data.image_size == (64, 64)
    assert torch.bincount(data.train.labels).tolist() == [10] * 10
    boxes = data.train.boxes
    assert (boxes[:, :2] < boxes[:, 2:]).all() and boxes.min() >= 0 and boxes.max() == 64


@needs("imagenet-samples")
def test_full_size_jpegs(tmp_path):
    for i, file in enumerate(sorted((DATA / "imagenet-samples").glob("*.JPEG"))[:4]):
        for part in ("train", "val"):
            (tmp_path / part / f"c{i}").mkdir(parents=True)
            shutil.copy(file, tmp_path / part / f"c{i}")
    data = open_data(f"folder:{tmp_path}")
    assert data.train.images.shape == (4, 224, 224, 3)
    assert torch.equal(data.train.images, data.val.images)
