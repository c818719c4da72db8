import os
import pickle

import numpy as np
import pytest

from attention_transfer.data.open import open_data
from attention_transfer.errors import UserError

FILES = {
    "cifar10": [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"],
    "cifar100": ["train", "test"],
}
LABELS = {"cifar10": "labels", "cifar100": "fine_labels"}
BASE = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


@pytest.fixture(params=["cifar10", "cifar100"])
def made(request, tmp_path, monkeypatch):
    """A few random images in torchvision's layout, whose checksums are not compared."""
    kind, folder = request.param, tmp_path / BASE[request.param]
    folder.mkdir()
    classes = int(kind[5:])
    rng = np.random.default_rng(0)
    for name in FILES[kind]:
        labels = list(range(0, classes, classes // 10))
        data = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
        (folder / name).write_bytes(
            pickle.dumps({"data": data, LABELS[kind]: labels, "coarse_labels": [0] * 10})
        )
    names = [f"class {i}" for i in range(classes)]
    meta = {"label_names": names} if kind == "cifar10" else {"fine_label_names": names}
    (folder / ("batches.meta" if kind == "cifar10" else "meta")).write_bytes(pickle.dumps(meta))
    monkeypatch.setattr(
        "torchvision.datasets.cifar.check_integrity", lambda path, md5=None: os.path.isfile(path)
    )
    return kind, folder


def first_image(folder, name):
    data = pickle.loads((folder / name).read_bytes())["data"]
    return data[0].reshape(3, 32, 32).transpose(1, 2, 0)


def test_torchvision_layout(made):
    kind, folder = made
    for place in (folder.parent, folder):
        data = open_data(f"{kind}:{place}")
        assert len(data.train) == 10 * (len(FILES[kind]) - 1) and len(data.val) == 10
        assert data.classes[1] == "class 1" and len(data.classes) == int(kind[5:])
        assert data.train.labels[1] == len(data.classes) // 10
        assert np.array_equal(data.train.images[0].numpy(), first_image(folder, FILES[kind][0]))
        assert np.array_equal(data.val.images[0].numpy(), first_image(folder, FILES[kind][-1]))


def test_a_folder_of_another_name(made):
    kind, folder = made
    renamed = folder.rename(folder.with_name("mine"))
    assert len(open_data(f"{kind}:{renamed}").val) == 10


def test_statistics(made):
    kind, folder = made
    data = open_data(f"{kind}:{folder}")
    if kind == "cifar10":
        assert data.mean == pytest.approx((0.4914, 0.4824, 0.4467), abs=1e-4)
        assert data.std == pytest.approx((0.2471, 0.2435, 0.2616), abs=1e-4)
    else:
        assert data.mean == pytest.approx((0.5,) * 3, abs=0.02)


def test_the_cache_is_used_and_named(made, tmp_path, monkeypatch, capfd):
    kind, folder = made
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = tmp_path / "cache" / "attention-transfer" / kind
    cache.mkdir(parents=True)

    def fail(*args, **kwargs):
        print("downloading")
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    with pytest.raises(
        UserError, match=f"cannot download {kind} into {cache} \\(no network\\).*{kind}:FOLDER"
    ):
        open_data(kind)
    folder.rename(cache / folder.name)
    assert len(open_data(kind).val) == 10
    assert capfd.readouterr() == ("", f"downloading {kind} into {cache}\n")
    # A read-only cache has no room for a lock.
    monkeypatch.setattr("attention_transfer.data.cifar.FileLock", fail)
    assert len(open_data(kind).val) == 10


def test_damaged_and_missing_files(made, tmp_path, monkeypatch):
    kind, folder = made
    (folder / FILES[kind][-1]).unlink()
    with pytest.raises(UserError, match=f"{folder} is incomplete or damaged"):
        open_data(f"{kind}:{folder}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"holds neither {BASE[kind]}/ .* nor train-"):
        open_data(f"{kind}:{tmp_path / 'empty'}")


def test_resized(made):
    kind, folder = made
    data = open_data(f"{kind}:{folder}", image_size=16, limit_train=10)
    assert data.train.images.shape == (10, 16, 16, 3) and data.std[0] < 0.2
