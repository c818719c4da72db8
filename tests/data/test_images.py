import pytest
import torch

from attention_transfer.data.images import (
    ImageSet,
    balanced_subset,
    channel_statistics,
    make_generator,
    stratified_split,
)
from attention_transfer.errors import UserError


def random_set(count=6, side=5):
    images = torch.randint(
        0, 256, (count, side, side, 3), dtype=torch.uint8, generator=make_generator(1)
    )
    boxes = torch.arange(count * 4).view(count, 4)
    files = tuple(f"{i}.png" for i in range(count))
    return ImageSet(images, torch.arange(count) % 2, ("a", "b"), boxes, files)


def test_subset_keeps_everything_together():
    images = random_set()
    part = images.subset(torch.tensor([4, 1]))
    assert len(part) == 2 and part.files == ("4.png", "1.png") and part.classes == ("a", "b")
    assert torch.equal(part.images, images.images[[4, 1]])
    assert torch.equal(part.labels, images.labels[[4, 1]])
    assert torch.equal(part.boxes, images.boxes[[4, 1]])


def test_batch_is_nchw_and_channels_last():
    images = random_set()
    for where in (slice(1, 4), torch.tensor([1, 2, 3]), [1, 2, 3]):
        x = images.batch(where)
        assert x.shape == (3, 3, 5, 5) and x.dtype == torch.uint8
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, images.images[1:4].permute(0, 3, 1, 2))
    assert images.batch(slice(0, 2)).data_ptr() == images.images.data_ptr()


def test_to_moves_all_tensors():
    moved = random_set().to("meta")
    assert {moved.images.device.type, moved.labels.device.type, moved.boxes.device.type} == {"meta"}


def test_balanced_subset_is_even_seeded_and_sorted():
    labels = torch.randint(0, 7, (2000,), generator=make_generator(3))
    chosen = balanced_subset(labels, 100, seed=5)
    counts = torch.bincount(labels[chosen], minlength=7)
    assert counts.max() - counts.min() == 1 and counts.sum() == 100
    assert torch.equal(chosen, chosen.unique())
    assert torch.equal(chosen, balanced_subset(labels, 100, seed=5))
    assert not torch.equal(chosen, balanced_subset(labels, 100, seed=6))


def test_balanced_subset_fills_in_for_short_classes():
    labels = torch.tensor([0] * 2 + [1] * 50 + [3] * 50)
    counts = torch.bincount(labels[balanced_subset(labels, 31, seed=0)])
    assert counts[0] == 2 and counts[2] == 0 and sorted(counts[[1, 3]].tolist()) == [14, 15]


def test_balanced_subset_of_all_or_of_nothing():
    labels = torch.arange(5)
    assert torch.equal(balanced_subset(labels, 9, seed=0), torch.arange(5))
    with pytest.raises(UserError, match="at least 1 image, got 0"):
        balanced_subset(labels, 0, seed=0)


def test_stratified_split_cuts_every_class():
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 3 + [3])
    rest, cut = stratified_split(labels, 0.1, seed=0)
    assert torch.equal(torch.cat([rest, cut]).sort().values, torch.arange(len(labels)))
    # At least one of every class that can spare one, none of a class of one.
    assert torch.bincount(labels[cut], minlength=4).tolist() == [4, 2, 1, 0]


def test_channel_statistics_against_float64():
    images = torch.randint(0, 256, (70, 33, 31, 3), dtype=torch.uint8, generator=make_generator(0))
    mean, std = channel_statistics(images)
    pixels = images.double().view(-1, 3) / 255
    torch.testing.assert_close(torch.tensor(mean).double(), pixels.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        torch.tensor(std).double(), pixels.std(0, correction=0), rtol=1e-6, atol=0
    )


def test_std_of_a_constant_image_can_be_divided_by():
    assert channel_statistics(torch.full((2, 3, 3, 3), 7, dtype=torch.uint8))[1] == (1 / 255,) * 3


def test_keys_of_generators_are_told_apart():
    draws = {
        torch.rand(1, generator=make_generator(*words)).item()
        for words in [(0, 1), (1, 0), (0, 0), (-1, 0), (2**40, 0)]
    }
    assert len(draws) == 5
