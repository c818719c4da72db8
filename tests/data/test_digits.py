import numpy as np
import pytest
import torch

from attention_transfer.data import digits
from attention_transfer.data.open import open_data


@pytest.fixture(scope="module")
def data():
    return open_data("digits")


def test_shapes_and_balance(data):
    assert (
        data.train.images.shape == (digits.TRAIN_SCENES, 32, 32, 3)
        and len(data.val) == digits.VAL_SCENES
    )
    assert data.classes == tuple("0123456789") and data.image_size == (32, 32)
    assert torch.bincount(data.train.labels).tolist() == [digits.TRAIN_SCENES // 10] * 10
    assert torch.equal(data.train.images[..., 0], data.train.images[..., 2])


def test_scenes_do_not_depend_on_the_run(data):
    again = open_data("digits", seed=9)
    assert torch.equal(again.train.images, data.train.images) and torch.equal(
        again.val.boxes, data.val.boxes
    )


def test_source_digits_of_training_and_validation_are_disjoint():
    labels = digits.source_digits()[1]
    train, val = digits.split_sources(labels)
    assert not set(train.tolist()) & set(val.tolist()) and len(train) + len(val) == 1797
    share = torch.bincount(labels[val]) / torch.bincount(labels)
    assert (share - 0.2).abs().max() < 0.01
    # Equal drawings in both would be as bad as equal indices.
    pixels, _ = digits.source_digits()
    assert not {x.tobytes() for x in pixels[train]} & {x.tobytes() for x in pixels[val]}


def test_the_whole_digit_is_in_its_box_and_fills_it(monkeypatch):
    pixels, labels = digits.source_digits()
    monkeypatch.setattr(digits, "FRAGMENTS", 0)
    monkeypatch.setattr(digits, "NOISE", 0.0)
    images, _, boxes = digits.make_scenes(pixels, labels.numpy(), 200, seed=0)
    for image, (x0, y0, x1, y1) in zip(images[..., 0].numpy(), boxes.tolist(), strict=True):
        rows, columns = np.nonzero(image)
        # Ink below half a grey level is lost to rounding: the box may be a pixel wider.
        assert 0 <= rows.min() - y0 <= 1 and 0 <= columns.min() - x0 <= 1
        assert 0 <= y1 - 1 - rows.max() <= 1 and 0 <= x1 - 1 - columns.max() <= 1


def test_the_digit_shows_through_the_clutter(monkeypatch):
    pixels, labels = digits.source_digits()
    monkeypatch.setattr(digits, "NOISE", 0.0)
    cluttered, targets, boxes = digits.make_scenes(pixels, labels.numpy(), 300, seed=4)
    monkeypatch.setattr(digits, "FRAGMENTS", 0)
    clean, same_targets, same_boxes = digits.make_scenes(pixels, labels.numpy(), 300, seed=4)
    assert torch.equal(targets, same_targets) and torch.equal(boxes, same_boxes)
    assert (cluttered >= clean).all() and (cluttered > clean).flatten(1).any(1).all()


def test_resized_with_its_boxes(data):
    small = open_data("digits", image_size=16, limit_train=20, limit_val=10)
    assert small.train.images.shape == (20, 16, 16, 3) and small.train.images.is_contiguous()
    assert (
        small.train.boxes.max() <= 16
        and (small.train.boxes[:, 2:] > small.train.boxes[:, :2]).all()
    )
    assert not torch.allclose(torch.tensor(small.std), torch.tensor(data.std), rtol=0.02)
