"""The share of a rank in a batch: images, labels and rows of the same images."""

import pytest
import torch
from small_runs import write_folder

from attention_transfer.data.open import open_data
from attention_transfer.data.options import AugmentOptions
from attention_transfer.data.plan import TrainingBatch
from attention_transfer.data.stream import Stream
from attention_transfer.data.transforms import make_transform
from attention_transfer.train.shares import own_share

RANKS = 3


def test_the_rows_of_a_share_are_those_of_its_images():
    numbers = torch.arange(10, 18)
    batch = TrainingBatch(numbers.float().view(-1, 1, 1, 1), numbers * 2, numbers)
    shares = [own_share(batch, rank, RANKS) for rank in range(RANKS)]
    for share in shares:
        assert share.images.flatten().tolist() == share.rows.tolist()
        assert share.labels.tolist() == (share.rows * 2).tolist()
    # Shares are equal, so two images of eight are left out.
    assert sorted(torch.cat([share.rows for share in shares]).tolist()) == list(range(10, 16))


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_stream_gives_each_rank_the_same_share(tmp_path, rank):
    folder = write_folder(tmp_path / "data", classes=3)
    images = open_data(f"folder:{folder}", stream="on", workers=0).train
    transform = make_transform(AugmentOptions(), images.size)
    whole, stream = Stream(images, transform), Stream(images, transform, rank=rank, world=RANKS)
    plan = whole.epoch(0, 0, 8)
    for column, expected in zip(
        stream.batch(plan, 0), own_share(whole.batch(plan, 0), rank, RANKS), strict=True
    ):
        torch.testing.assert_close(column, expected, rtol=0, atol=0)
