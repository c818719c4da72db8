"""Streamed images make the batches of resident ones, with any workers and from any step on."""

import multiprocessing
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from attention_transfer.data import stream as streams
from attention_transfer.data.augment import Augment
from attention_transfer.data.images import balanced_subset
from attention_transfer.data.open import open_data
from attention_transfer.data.options import AugmentOptions
from attention_transfer.data.stream import Stream, default_workers
from attention_transfer.data.transforms import make_transform
from attention_transfer.errors import RunError, UserError


@pytest.fixture
def root(make_folder):
    return make_folder(train=7, val=3)


def opened(root, workers=0, **options):
    return open_data(f"folder:{root}", stream="on", workers=workers, **options)


def stream(data, augment="crop", **options):
    transform = make_transform(AugmentOptions(augment, crop_padding=2), data.train.size)
    return Stream(data.train, transform, **options)


def epoch(maker, seed=3, number=0, batch_size=4, first=0):
    plan = maker.epoch(seed, number, batch_size)
    return [maker.batch(plan, step) for step in range(first, len(plan))]


def assert_same(one, other):
    assert len(one) == len(other) > 0
    for batch, expected in zip(one, other, strict=True):
        for tensor, wanted in zip(batch, expected, strict=True):
            assert torch.equal(tensor, wanted)


def test_batches_are_those_of_resident_images(root):
    resident, data = open_data(f"folder:{root}", limit_train=11), opened(root, limit_train=11)
    for number in range(2):
        assert_same(
            epoch(stream(data), number=number), epoch(Augment(resident.train, 2), number=number)
        )
    assert torch.equal(data.val.batch(slice(None)), resident.val.batch(slice(None)))
    assert (
        data.mean == resident.mean and data.std == resident.std and data.classes == resident.classes
    )


@pytest.mark.parametrize("augment", ["crop", "imagenet"])
def test_workers_change_nothing(root, augment):
    before = torch.get_rng_state()
    alone, several = (epoch(stream(opened(root, workers), augment)) for workers in (0, 2))
    assert_same(alone, several)
    x, y, _ = alone[0]
    assert x.dtype == torch.uint8 and x.shape == (4, 3, 8, 8) and y.dtype == torch.int64
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_and_epochs_differ(root):
    made = [
        epoch(stream(opened(root), "imagenet"), seed, number)[0][0]
        for seed, number in ((3, 0), (3, 1), (4, 0))
    ]
    assert not any(torch.equal(made[i], made[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_an_epoch_is_entered_anywhere_without_decoding_what_was_before(root, monkeypatch):
    whole = epoch(stream(opened(root), "imagenet"))
    data = opened(root)
    read = []
    encoded = type(data.train.reader).encoded
    monkeypatch.setattr(
        type(data.train.reader), "encoded", lambda self, i: read.append(i) or encoded(self, i)
    )
    assert_same(epoch(stream(data, "imagenet"), first=2), whole[2:])
    assert len(read) == 4 * len(whole[2:])


def test_steps_out_of_order(root):
    maker = stream(opened(root))
    plan = maker.epoch(0, 0, 4)
    ordered = [maker.batch(plan, step) for step in range(len(plan))]
    assert_same(
        [maker.batch(plan, step) for step in (2, 0, 1)], [ordered[step] for step in (2, 0, 1)]
    )


def test_processes_share_a_batch(root):
    whole = epoch(stream(opened(root)), batch_size=5)
    for rank in range(2):
        parts = epoch(stream(opened(root), rank=rank, world=2), batch_size=5)
        share = slice(rank, 4, 2)
        assert_same(parts, [(x[share], y[share], rows[share]) for x, y, rows in whole])


def test_subsets_and_validation_batches(root):
    data, resident = opened(root, workers=2), open_data(f"folder:{root}")
    chosen = balanced_subset(data.val.labels, 3, seed=0)
    made, expected = data.val.subset(chosen), resident.val.subset(chosen)
    assert torch.equal(made.images, expected.images) and made.files == expected.files
    first, last = data.val.batches(4)
    everything = resident.val.batch(slice(None))
    assert torch.equal(first, everything[:4]) and torch.equal(last, everything[[4, 5, 0, 1]])


def test_validation_images_are_resized_beyond_the_centre(root, picture):
    from PIL import Image

    picture(20, 10).save(root / "val" / "cat" / "0.png")
    enlarged = opened(root, image_size=7, val_resize=8 / 7).val.batch([0])[0].permute(1, 2, 0)
    expected = picture(20, 10).resize((16, 8), Image.Resampling.BILINEAR).crop((4, 0, 11, 7))
    assert np.array_equal(enlarged.numpy(), np.asarray(expected))
    resident = open_data(f"folder:{root}", image_size=7, val_resize=8 / 7)
    assert torch.equal(resident.val.batch([0])[0].permute(1, 2, 0), enlarged)
    shutil.rmtree(root / "val")
    cut = opened(root, image_size=7, val_resize=8 / 7, val_split=0.5)
    assert (cut.train.short_side, cut.val.short_side) == (None, 8)


def test_boxes_follow_their_images(root):
    (root / "boxes.csv").write_text("file,x_min,y_min,x_max,y_max\nval/cat/1.png,0,2,7,5\n")
    data = opened(root, image_size=16)
    assert data.val.boxes.tolist() == [[0, 0, 0, 0], [0, 2, 8, 6]] + [[0, 0, 0, 0]] * 4
    assert data.val.subset(torch.tensor([0, 1])).boxes.tolist() == [[0, 0, 0, 0], [0, 4, 16, 12]]


def damage(file):
    file.write_bytes(file.read_bytes()[:60])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_named(root, workers):
    damage(root / "train" / "dog" / "2.png")
    data = opened(root, workers, on_bad_image="skip")
    strict = replace(data.train, on_bad_image="error")
    maker = Stream(strict, make_transform(AugmentOptions("imagenet"), 8))
    with pytest.raises(
        UserError, match=r"cannot read the image .*train/dog/2\.png \(.*expected a whole image"
    ) as caught:
        epoch(maker, batch_size=14)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_are_skipped_and_counted(root, workers):
    for part, name in (("train", "dog"), ("val", "cat")):
        damage(root / part / name / "2.png")
    data = opened(root, workers, on_bad_image="skip")
    resident = open_data(f"folder:{root}", on_bad_image="skip")
    ((x, _, _),) = epoch(stream(data), batch_size=14)
    assert len(x) == 14 and data.train.bad == {9} and data.unreadable_count() == 1
    list(data.val.batches(6))
    assert data.val.bad == {2} and data.unreadable_count() == 2
    assert torch.equal(data.val.subset(torch.arange(6)).images, resident.val.images)


def test_the_substitute_keeps_its_own_label(root):
    damage(root / "train" / "dog" / "2.png")
    data = opened(root, on_bad_image="skip")
    whole = {}
    for i, label in enumerate(data.train.labels.tolist()):
        if i != 9:
            whole[data.train.batch([i]).numpy().tobytes()] = label
    maker = Stream(data.train, make_transform(AugmentOptions(crop_padding=0, flip=False), 8))
    for x, y, rows in epoch(maker, batch_size=7):
        assert 9 not in rows and torch.equal(y, data.train.labels[rows])
        assert [
            whole[image[None].contiguous(memory_format=torch.channels_last).numpy().tobytes()]
            for image in x
        ] == (y.tolist())


def test_a_batch_without_any_good_image(root):
    """As when the files are gone in the middle of a run: that is not skipped."""
    data = opened(root, on_bad_image="skip")
    shutil.rmtree(root / "train")
    with pytest.raises(UserError, match=r"cannot read the image .*train/"):
        epoch(stream(data))
    with pytest.raises(UserError, match="has no folder train/"):
        opened(root)


def test_accuracy_is_that_of_the_readable_images(root):
    from attention_transfer.apply.evaluate import evaluate

    damage(root / "val" / "cat" / "0.png")
    data = opened(root, on_bad_image="skip")
    resident = open_data(f"folder:{root}", on_bad_image="skip")
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    expected = evaluate(network, resident.val, 4, "cpu")
    assert evaluate(network, data.val, 4, "cpu") == pytest.approx(expected, rel=1e-5)


def test_a_dead_worker_is_a_failed_run(root, monkeypatch):
    if multiprocessing.get_start_method() != "fork":
        pytest.skip("what is patched is inherited by forked workers only")
    import os

    data = opened(root, workers=1)
    monkeypatch.setattr(type(data.train.reader), "encoded", lambda self, i: os._exit(9))
    with pytest.raises(
        RunError, match="a worker that decodes images died .*fewer --workers"
    ) as caught:
        epoch(stream(data))
    assert "\n" not in str(caught.value)


def test_little_shared_memory_means_fewer_workers(root, monkeypatch):
    if not streams.Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm here")
    data = opened(root, workers=8)
    batch = 4 * 8 * 8 * 3
    monkeypatch.setattr(
        streams.shutil,
        "disk_usage",
        lambda _: shutil._ntuple_diskusage(0, 0, 3 * 3 * batch * 5 // 4),
    )
    told = stream(data).describe(4)
    assert "by 3 workers (/dev/shm has no room for the batches of 8 workers" in told
    monkeypatch.undo()
    assert (
        stream(opened(root, workers=1)).describe(4) == "images decoded while training, by 1 worker"
    )


def test_a_reader_can_be_sent_to_another_process(root):
    reader = opened(root).train.reader
    again = pickle.loads(pickle.dumps(reader))
    assert [again.encoded(i) for i in range(len(again))] == [
        reader.encoded(i) for i in range(len(reader))
    ]


def test_names_of_files_are_kept_whatever_they_are():
    from attention_transfer.data.reader import PackedStrings

    names = ["a", "", "ü/β.png", "\udcff.jpg"]
    packed = PackedStrings(names)
    assert list(packed) == names and packed[2] == names[2] and len(packed) == 4
    with pytest.raises(IndexError):
        packed[4]


def test_default_workers():
    assert 1 <= default_workers(True) <= default_workers(False) <= 16
    assert default_workers(False, processes=1000) == 1
