"""Fixed views: they depend on the number of the view and on the image, and on nothing else."""

import pytest
import torch
from test_stream import damage

from attention_transfer.config import make_recipe
from attention_transfer.data.augment import Augment
from attention_transfer.data.images import ImageSet, make_generator, resize_images
from attention_transfer.data.open import open_data
from attention_transfer.data.options import AugmentOptions
from attention_transfer.data.stream import Stream
from attention_transfer.data.transforms import make_transform
from attention_transfer.errors import UserError

VIEWS = 3


@pytest.fixture
def root(make_folder):
    return make_folder(train=10)


def resident(root, seed=0, **options):
    return Augment(open_data(f"folder:{root}", seed=seed, **options).train, 2, views=VIEWS)


def streamed(root, seed=0, augment="crop", rank=0, world=1, **options):
    images = open_data(f"folder:{root}", seed=seed, stream="on", **options).train
    transform = make_transform(AugmentOptions(augment, crop_padding=2), images.size)
    return Stream(images, transform, rank=rank, world=world, views=VIEWS)


def batches(loader, plan):
    return [loader.batch(plan, step) for step in range(len(plan))]


def by_row(made):
    """Pixels and label by the image's number in its source; each image occurs once."""
    shown = {}
    for x, y, rows in made:
        for image, label, row in zip(x, y.tolist(), rows.tolist(), strict=True):
            assert row not in shown
            shown[row] = (image.numpy().tobytes(), label)
    return shown


def epoch(loader, seed=0, number=0, batch_size=4):
    return by_row(batches(loader, loader.epoch(seed, number, batch_size)))


def assert_shared(one, other, expected):
    """All images that two epochs both show are the same there."""
    common = one.keys() & other.keys()
    assert len(common) >= 3
    for row in common:
        assert (one[row] == other[row]) is expected


@pytest.mark.parametrize("loader", [resident, streamed])
def test_an_epoch_shows_the_view_of_its_number(root, loader):
    maker = loader(root)
    shown = [epoch(maker, number=number) for number in range(2 * VIEWS)]
    for number in range(VIEWS):
        assert shown[number] == shown[number + VIEWS]
    pixels = [[shown[number][row][0] for row in range(20)] for number in range(VIEWS)]
    assert len({tuple(view) for view in pixels}) == VIEWS
    assert [maker.epoch(0, number, 4).view for number in range(4)] == [0, 1, 2, 0]


def test_the_order_stays_that_of_seed_and_epoch(root):
    maker = resident(root)
    orders = [maker.epoch(seed, number, 4).order for seed in range(2) for number in (0, VIEWS)]
    for k, key in enumerate([(0, 0), (0, VIEWS), (1, 0), (1, VIEWS)]):
        assert torch.equal(orders[k], torch.randperm(20, generator=make_generator(*key)))


@pytest.mark.parametrize("loader", [resident, streamed])
@pytest.mark.parametrize("subset", [{"limit_train": 12}, {"val_split": 0.5}])
def test_seeds_and_subsets_show_the_same_views(root, loader, subset):
    whole = epoch(loader(root))
    drawn = []
    for seed in range(2):
        some = epoch(loader(root, seed, **subset), seed)
        assert_shared(some, whole, True)
        drawn.append(frozenset(some))
    assert drawn[0] != drawn[1]


def test_streamed_images_show_the_views_of_resident_ones(root):
    for number in range(VIEWS):
        here, there = resident(root, limit_train=15), streamed(root, limit_train=15)
        assert epoch(here, number=number) == epoch(there, number=number)


def test_random_resized_crops_are_fixed_too(root):
    first, again = (streamed(root, seed, "imagenet", image_size=6) for seed in range(2))
    assert epoch(first, 0, 1) == epoch(again, 1, 1 + VIEWS)
    assert epoch(first, 0, 1) != epoch(first, 0, 2)


@pytest.mark.parametrize("loader", [resident, streamed])
def test_an_image_that_is_left_out_moves_no_other(root, loader):
    whole = epoch(loader(root))
    damage(root / "train" / "cat" / "3.png")
    maker = loader(root, on_bad_image="skip")
    plan = maker.view_plan(0, torch.arange(len(maker.images)), 20)
    shown = {}
    for x, _, rows in batches(maker, plan):
        for image, row in zip(x, rows.tolist(), strict=True):
            assert image.numpy().tobytes() == whole[row][0]
            shown[row] = image
    assert sorted(shown) == [row for row in range(20) if row != 3]


@pytest.mark.parametrize("loader", [resident, streamed])
def test_a_plan_of_one_view_holds_every_image(root, loader):
    maker = loader(root)
    index = torch.arange(20)
    made = batches(maker, maker.view_plan(2, index, 6))
    assert [len(batch.rows) for batch in made] == [6, 6, 6, 2]
    assert torch.equal(torch.cat([batch.rows for batch in made]), index)
    assert by_row(made) == epoch(maker, number=2)


def test_processes_share_the_images_of_a_view_without_a_remainder(root):
    rows = []
    for rank in range(3):
        maker = streamed(root, rank=rank, world=3)
        made = batches(maker, maker.view_plan(0, torch.arange(20)[rank::3], 5))
        rows += torch.cat([batch.rows for batch in made]).tolist()
    assert sorted(rows) == list(range(20))


def test_without_views_the_draws_are_those_of_seed_and_epoch(root):
    """As they always were: a run of an older version continues."""
    for maker in (resident(root), streamed(root)):
        maker.views = None
        plan = maker.epoch(5, 7, 4)
        generator = make_generator(5, 7)
        assert torch.equal(plan.order, torch.randperm(20, generator=generator))
        assert torch.equal(plan.dy, torch.randint(0, 5, (20,), generator=generator))
        assert torch.equal(plan.dx, torch.randint(0, 5, (20,), generator=generator))
        assert torch.equal(plan.flip, torch.rand(20, generator=generator) < 0.5)
        assert torch.equal(plan.noise, torch.randint(0, 1 << 31, (20,), generator=generator))
        assert plan.view is None and torch.equal(plan.rows, plan.order)


def test_an_image_keeps_its_number():
    pixels = torch.zeros((6, 8, 8, 3), dtype=torch.uint8)
    images = ImageSet(pixels, torch.zeros(6, dtype=torch.int64), ("a",))
    assert images.rows.tolist() == [0, 1, 2, 3, 4, 5] and images.source_size == 6
    some = resize_images(images.subset(torch.tensor([5, 1, 4])).to("cpu"), 4)
    assert some.rows.tolist() == [5, 1, 4] and some.source_size == 6
    assert some.select(torch.tensor([2, 0])).rows.tolist() == [4, 5]


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_mixed_images_have_no_fixed_views(mixing):
    with pytest.raises(UserError, match="--views is given with --mixup or --cutmix.*leave one"):
        make_recipe({"model": "wrn-10-1", "views": 2, mixing: 0.2})
    with pytest.raises(UserError, match="views is 0: expected a whole number ≥ 1, or auto"):
        make_recipe({"model": "wrn-10-1", "views": 0})


@pytest.mark.parametrize(("epochs", "views"), [("12", 4), (13, 5), (1, 1)])
def test_auto_shows_each_view_three_times(epochs, views):
    recipe = make_recipe({"model": "wrn-10-1", "views": "auto", "epochs": epochs})
    assert recipe.views == views
    assert make_recipe({"model": "wrn-10-1", "views": "auto"}).views == 5  # of 15 epochs
    with pytest.raises(UserError, match="epochs is 0"):
        make_recipe({"model": "wrn-10-1", "views": "auto", "epochs": 0})
