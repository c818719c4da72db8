from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from attention_transfer.data.augment import Augment
from attention_transfer.data.images import ImageSet, make_generator
from attention_transfer.errors import UserError


def random_set(count, height, width):
    images = torch.randint(
        0, 256, (count, height, width, 3), dtype=torch.uint8, generator=make_generator(1)
    )
    return ImageSet(images, torch.arange(count) % 3, ("a", "b", "c"))


def one_by_one(images, plan, step, padding):
    """Pads, crops and flips each image, as torchvision's RandomCrop and RandomHorizontalFlip."""
    made = []
    for k in range(step * plan.batch_size, min((step + 1) * plan.batch_size, len(images))):
        image = images.images[plan.order[k]].permute(2, 0, 1).double()[None]
        padded = F.pad(image, [padding] * 4, mode="reflect")[0]
        height, width = images.image_size
        crop = padded[:, plan.dy[k] : plan.dy[k] + height, plan.dx[k] : plan.dx[k] + width]
        made.append(crop.flip(2) if plan.flip[k] else crop)
    return torch.stack(made).to(torch.uint8)


@pytest.mark.parametrize(
    ("height", "width", "padding"), [(8, 8, 4), (5, 9, 4), (9, 5, 1), (6, 7, 0), (32, 32, 4)]
)
@pytest.mark.parametrize("flip", [True, False])
def test_one_gather_equals_image_by_image(height, width, padding, flip):
    images = random_set(70, height, width)
    augment = Augment(images, padding, flip)
    plan = replace(augment.epoch(seed=3, epoch=2, batch_size=32), split=False)
    assert len(plan) == 3 and plan.flip.any() == flip
    for step in range(3):
        x, y, rows = augment.batch(plan, step)
        assert torch.equal(x, one_by_one(images, plan, step, padding))
        assert torch.equal(y, images.labels[plan.order[32 * step : 32 * (step + 1)]])
        assert torch.equal(rows, plan.order[32 * step : 32 * (step + 1)])
        assert x.dtype == torch.uint8 and x.is_contiguous(memory_format=torch.channels_last)


def test_all_offsets_and_both_flips_are_drawn():
    plan = Augment(random_set(4000, 6, 6), 2).epoch(0, 0, 100)
    assert torch.equal(plan.dy.unique(), torch.arange(5)) and torch.equal(
        plan.dx.unique(), torch.arange(5)
    )
    assert 0.45 < plan.flip.double().mean() < 0.55
    assert abs(torch.corrcoef(torch.stack([plan.dy, plan.dx]).double())[0, 1]) < 0.06


def test_neither_crop_nor_flip_is_the_identity():
    images = random_set(10, 4, 4)
    augment = Augment(images, 0, flip=False)
    plan = augment.epoch(0, 0, 10)
    assert torch.equal(augment.batch(plan, 0)[0], images.batch(plan.order))


def test_an_epoch_is_made_again_from_seed_and_epoch():
    augment = Augment(random_set(50, 4, 4), 2)
    plans = {key: augment.epoch(*key, batch_size=10) for key in [(0, 0), (0, 1), (1, 0)]}
    for key, plan in plans.items():
        again = augment.epoch(*key, batch_size=10)
        for name in ("order", "dy", "dx", "flip"):
            assert torch.equal(getattr(plan, name), getattr(again, name))
        assert torch.equal(plan.order.sort().values, torch.arange(50))
    orders = {tuple(plan.order.tolist()) for plan in plans.values()}
    assert len(orders) == 3


def test_global_random_state_is_left_alone():
    augment = Augment(random_set(5, 4, 4), 2)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    augment.epoch(0, 0, 2)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("count", "batch_size", "split", "sizes"),
    [
        (10, 4, True, [4, 4]),
        (10, 4, False, [4, 4, 2]),
        (8, 4, False, [4, 4]),
        (3, 4, True, [3]),
        (3, 4, False, [3]),
    ],
)
def test_batches_of_an_epoch(count, batch_size, split, sizes):
    augment = Augment(random_set(count, 4, 4), 1)
    plan = replace(augment.epoch(0, 0, batch_size), split=split)
    assert [len(augment.batch(plan, step).rows) for step in range(len(plan))] == sizes


@pytest.mark.parametrize("padding", [-1, 4, 9])
def test_padding_must_be_smaller_than_the_image(padding):
    with pytest.raises(
        UserError, match=rf"crop_padding is {padding}.*0 <= crop_padding < 4 for images of 6x4"
    ):
        Augment(random_set(2, 6, 4), padding)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_same_batches():
    images = random_set(100, 8, 8)
    here, there = Augment(images, 3), Augment(images.to("cuda"), 3)
    ours, theirs = here.epoch(1, 2, 32), there.epoch(1, 2, 32)
    for step in range(len(ours)):
        x, y, _ = there.batch(theirs, step)
        assert x.is_cuda and x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(here.batch(ours, step)[0], x.cpu()) and torch.equal(
            here.batch(ours, step)[1], y.cpu()
        )
