"""A store of what a teacher says: reading, adding, sharing, and everything that can be wrong."""

from __future__ import annotations

import copy
import errno
import json
import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch
from toys import CLASSES, Net, batch

import attention_transfer as at
from attention_transfer.errors import UserError
from attention_transfer.map_options import MapOptions
from attention_transfer.store import arrays
from attention_transfer.store.create import create_store
from attention_transfer.store.header import store_defaults
from attention_transfer.store.store import TeacherStore

IMAGES, VIEWS = 10, 2
ROWS = torch.tensor([3, 1, 9, 4])


def teacher():
    return Net(8, seed=1)


def create(folder, **options):
    options = {"images": IMAGES, "views": VIEWS, "data": "ten images"} | options
    return create_store(folder, options.pop("teacher", teacher()), batch()[0], **options)


def say(layers=("one", "two", "three"), x=None):
    """The logits and features of the teacher."""
    with torch.no_grad(), at.tap(teacher(), layers) as tapped:
        return tapped(batch()[0] if x is None else x)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def store(tmp_path):
    return create(tmp_path / "store")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-4), ("float32", 1e-7)])
def test_what_was_said_is_read_back(tmp_path, dtype, tolerance):
    store = create(tmp_path / "store", dtype=dtype)
    logits, features = say()
    added = store.add(ROWS, 1, logits, features)
    found = TeacherStore(tmp_path / "store").read(ROWS.flip(0), 1)
    torch.testing.assert_close(found.logits.flip(0), logits, rtol=tolerance, atol=1e-7)
    assert list(found.maps) == ["one.sum2", "two.sum2", "three.sum2"]
    for layer, feature in features.items():
        expected = at.attention_map(feature).view(4, *feature.shape[2:])
        found_map = found.maps[f"{layer}.sum2"].flip(0)
        torch.testing.assert_close(found_map, expected, rtol=tolerance, atol=1e-7)
        assert torch.equal(found_map, added.maps[f"{layer}.sum2"])
    assert found.logits.dtype == torch.float32


def test_the_first_word_stays(store):
    logits, features = say()
    store.add(ROWS[:2], 0, logits[:2], {name: f[:2] for name, f in features.items()})
    other = {name: f.flip(2) for name, f in features.items()}
    both = store.add(ROWS, 0, logits + 1, other)
    torch.testing.assert_close(both.logits[:2], logits[:2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(both.logits[2:], logits[2:] + 1, rtol=1e-3, atol=1e-3)
    assert torch.equal(store.read(ROWS, 0).logits, both.logits)


def test_an_image_that_stands_twice_in_a_batch(store):
    logits, features = say()
    rows = torch.tensor([5, 5, 2, 5])
    index = torch.tensor([0, 0, 2, 0])
    features = {name: f[index] for name, f in features.items()}
    added = store.add(rows, 0, logits[index], features)
    torch.testing.assert_close(added.logits, logits[index], rtol=1e-3, atol=1e-3)
    assert store.filled(torch.arange(IMAGES), 0).nonzero().flatten().tolist() == [2, 5]


def test_what_is_there(store):
    assert not store.has(ROWS, 0) and store.count_missing(ROWS, [0, 1]) == 8
    store.add(ROWS, 0, *say())
    assert store.has(ROWS, 0) and not store.has(ROWS, 1)
    assert store.count_missing(torch.arange(IMAGES), [0, 1]) == 16
    with pytest.raises(at.UserError, match=r"has no row 0 of view 0 \(2 of 3 are missing\)"):
        store.read(torch.tensor([3, 0, 2]), 0)


def test_the_files_are_plain_arrays(store):
    store.add(ROWS, 1, *say())
    maps = np.load(store.folder / "two.sum2.npy")
    assert maps.shape == (VIEWS, IMAGES, 4, 4) and maps.dtype == np.float16
    assert not maps[0].any()
    norms = np.square(maps[1, ROWS.numpy()].astype(np.float64)).sum((1, 2))
    np.testing.assert_allclose(norms, 1, rtol=1e-3)
    # What the header says beforehand is what the files hold, but for their own headers.
    files = sum(file.stat().st_size for file in store.folder.glob("*.npy"))
    assert files - 128 * len(list(store.folder.glob("*.npy"))) == store.header.bytes


def test_maps_of_another_kind_are_added(store):
    store.add(ROWS, 0, *say())
    options = MapOptions("max", 4.0)
    wider = create(store.folder, layers=["two"], kind="max", p=4.0).select(["two"], options)
    assert not wider.has(ROWS, 0) and store.has(ROWS, 0)
    logits, features = say()
    added = wider.add(ROWS, 0, logits, features)
    torch.testing.assert_close(
        added.maps["two.max4"].flatten(1),
        at.attention_map(features["two"], "max", 4.0),
        rtol=1e-3,
        atol=1e-6,
    )
    assert TeacherStore(store.folder).has(ROWS, 0)
    assert [stage.name for stage in wider.stages(options)] == ["two"]
    with pytest.raises(at.UserError, match=r"has the maps .*: expected one\.max4"):
        wider.select(["one"], options)


def test_maps_over_channels(tmp_path):
    store = create(tmp_path / "store", layers=["three"], axis="channel")
    logits, features = say(["three"])
    added = store.add(ROWS, 0, logits, features)
    expected = at.attention_map(features["three"], axis="channel")
    torch.testing.assert_close(added.maps["three.sum2.channel"], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"teacher": Net(8, seed=2)},
            "another teacher: the weights or the preprocessing",
        ),
        ({"data": "others"}, r"other images: 10 of ten images .*, not 10 of others"),
        ({"images": 11}, r"other images: 10 of .*, not 11 of"),
        ({"views": 3}, "other outputs: views is 2 in the store and 3 in this command"),
        ({"dtype": "float32"}, "store_dtype is float16 in the store and float32 in this"),
        ({"top_k": 2}, "top_k is all in the store and 2 in this command"),
        ({"teacher_transform": torch.nn.ReLU()}, "store of another teacher"),
    ],
)
def test_a_store_of_anything_else_is_refused(store, change, message):
    before = contents(store.folder)
    with pytest.raises(at.UserError, match=message):
        create(store.folder, **change)
    assert contents(store.folder) == before


def test_wrong_arguments(store, tmp_path):
    logits, features = say()
    for rows, view, message in (
        (ROWS + 7, 0, "expected numbers .* from 0 to 9"),
        (-ROWS, 0, "expected numbers"),
        (ROWS, 2, "view is 2: .* has views 0 to 1"),
        (ROWS[None], 0, "expected numbers"),
    ):
        with pytest.raises(at.UserError, match=message):
            store.read(rows, view)
    with pytest.raises(at.UserError, match="features has the layers one: expected two as well"):
        store.add(ROWS, 0, logits, {"one": features["one"]})
    with pytest.raises(at.UserError, match=r"logits of the teacher is \(4, 4\)"):
        store.add(ROWS, 0, logits[:, :4], features)
    with pytest.raises(at.UserError, match=r"one\.sum2 of the teacher is \(4, 4, 4\)"):
        store.add(ROWS, 0, logits, features | {"one": features["two"]})
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(at.RunError, match="the teacher's logits are not finite"):
            store.add(ROWS, 0, logits.abs() * wrong, features)
    with pytest.raises(at.UserError, match=r"features: .* values are NaN or infinite"):
        store.add(ROWS, 0, logits, features | {"one": features["one"] * torch.nan})
    assert not store.filled(torch.arange(IMAGES), 0).any()
    with pytest.raises(at.UserError, match="images is 0: expected a whole number"):
        create(tmp_path / "none", images=0)
    with pytest.raises(at.UserError, match="top_k is 5: expected 1 to 4"):
        create(tmp_path / "none", top_k=CLASSES)
    assert not (tmp_path / "none").exists()


def test_a_folder_that_is_no_store(tmp_path):
    with pytest.raises(at.UserError, match="none does not exist; name the folder that teach wrote"):
        TeacherStore(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(at.UserError, match=r"is no store: it has no store\.json"):
        TeacherStore(tmp_path)
    with pytest.raises(at.UserError, match="exists and holds no store"):
        create(tmp_path)
    with pytest.raises(at.UserError, match="is a file"):
        create(tmp_path / "notes.txt")
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_somebodys_arrays_are_no_store(tmp_path):
    np.save(tmp_path / "logits.npy", np.arange(3))
    before = contents(tmp_path)
    with pytest.raises(at.UserError, match="exists and holds no store"):
        create(tmp_path)
    assert contents(tmp_path) == before


def test_other_keys_among_the_views_are_no_options(store):
    header = json.loads((store.folder / "store.json").read_text())
    header["views"] |= {"student_weights": "evil", "trust_code": True, "epochs": 1}
    (store.folder / "store.json").write_text(json.dumps(header))
    defaults = store_defaults(str(store.folder))
    assert "views" in defaults and not defaults.keys() & {"student_weights", "trust_code", "epochs"}


def test_a_damaged_store(store):
    folder = store.folder
    before = contents(folder)

    def refused(name, content, message):
        (folder / name).write_bytes(content)
        with pytest.raises(at.UserError, match=message):
            TeacherStore(folder)
        (folder / name).write_bytes(before[name])

    refused("two.sum2.npy", before["two.sum2.npy"][:-1], r"two\.sum2\.npy: it is cut short")
    refused("two.sum2.npy", b"", r"two\.sum2\.npy: it is cut short")
    refused("two.sum2.npy", before["two.sum2.npy"].replace(b"'fortran", b"#fortran"), "damaged")
    refused("logits.filled.npy", before["logits.filled.npy"][:-1], "it is cut short")
    refused("one.sum2.npy", before["two.sum2.npy"], r"is float16 \(2, 10, 4, 4\): expected")
    refused("store.json", before["store.json"][:-9], r"store\.json is damaged")
    refused("store.json", b"[]", r"store\.json is damaged")
    header = json.loads(before["store.json"])
    refused("store.json", json.dumps(header | {"views": 3}).encode(), r"store\.json is damaged")
    refused("store.json", json.dumps(header | {"version": 2}).encode(), "has version 2")
    (folder / "two.sum2.npy").unlink()
    with pytest.raises(at.UserError, match=r"two\.sum2\.npy: it is missing"):
        TeacherStore(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"views": {"views": 0}}, "views is 0"),
        ({"views": {}}, "views is None"),
        ({"images": {"count": 11}}, r"logits has the shape \(2, 10, 5\), expected \(2, 11, 5\)"),
        ({"teacher": {"classes": ["a"]}}, r"logits has the shape .*, expected \(2, 10, 1\)"),
        ({"top_k": 5}, "top_k is 5, expected less than its 5 classes"),
        ({"top_k": 2}, "expected logits, logits.classes and maps"),
        ({"arrays": []}, "its arrays are"),
    ],
)
def test_a_header_that_contradicts_itself(store, change, words):
    header = json.loads((store.folder / "store.json").read_text())
    for key, value in change.items():
        header[key] = header[key] | value if isinstance(value, dict) and value else value
    (store.folder / "store.json").write_text(json.dumps(header))
    with pytest.raises(UserError, match=rf"store\.json is damaged: .*{words}"):
        TeacherStore(store.folder)


def test_a_map_of_another_layer_than_its_name_says(store):
    header = json.loads((store.folder / "store.json").read_text())
    (entry,) = (entry for entry in header["arrays"] if entry["layer"] == "two")
    entry["layer"] = "three"
    (store.folder / "store.json").write_text(json.dumps(header))
    with pytest.raises(UserError, match=r"two\.sum2 has the layer and options of three\.sum2"):
        TeacherStore(store.folder)


def test_classes_that_the_teacher_does_not_have(tmp_path):
    store = create(tmp_path / "store", top_k=2)
    store.add(ROWS, 0, *say())
    assert store.read(ROWS, 0).logits.shape == (4, CLASSES)
    np.lib.format.open_memmap(tmp_path / "store" / "logits.classes.npy", "r+")[0, 1] = CLASSES
    with pytest.raises(UserError, match=r"logits\.classes\.npy is damaged: it has classes beyond"):
        store.read(ROWS, 0)


@pytest.mark.parametrize("bytes_left", [0, 100])
def test_a_full_disk(store, monkeypatch, bytes_left):
    """Nothing that is there is lost, nothing half-written counts, and training gets its values."""
    store.add(ROWS[:2], 0, *(say()[0][:2], {n: f[:2] for n, f in say()[1].items()}))
    before, left = store.read(ROWS[:2], 0), [bytes_left]
    pwrite = os.pwrite

    def nearly_full(file, data, offset):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        data = data[: left[0]]
        left[0] -= len(data)
        return pwrite(file, data, offset)

    monkeypatch.setattr(arrays.os, "pwrite", nearly_full)
    logits, features = say()
    added = store.add(ROWS, 0, logits + 1, features)
    assert store.note == f"{store.folder} cannot be written (No space left on device)"
    assert torch.equal(added.logits[:2], before.logits)
    torch.testing.assert_close(added.logits[2:], logits[2:] + 1, rtol=1e-3, atol=1e-3)
    monkeypatch.undo()
    again = TeacherStore(store.folder)
    assert again.filled(ROWS, 0).tolist() == [True, True, False, False]
    assert torch.equal(again.read(ROWS[:2], 0).logits, before.logits)
    # A store that can be written to again takes up what is missing.
    assert torch.equal(again.add(ROWS, 0, logits + 1, features).logits, added.logits)
    assert again.has(ROWS, 0)


def test_a_store_that_may_not_be_written(store, monkeypatch):
    store.add(ROWS[:2], 0, *(say()[0][:2], {n: f[:2] for n, f in say()[1].items()}))

    def refuse(path, flags, *mode):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(arrays.os, "open", refuse)
    assert store.has(ROWS[:2], 0) and store.read(ROWS[:2], 0).logits.shape == (2, CLASSES)
    added = store.add(ROWS, 0, *say())
    assert added.logits.shape == (4, CLASSES)
    assert store.note == f"{store.folder} cannot be written (Permission denied)"
    assert create(store.folder).has(ROWS[:2], 0)
    with pytest.raises(at.UserError, match=r"cannot write the store .* \(Permission denied\)"):
        create(store.folder, kind="max")


def fill_a_part(folder, rank):
    torch.set_num_threads(1)
    store = TeacherStore(folder)
    for start in range(0, IMAGES, 2):
        x = torch.full((4, 3, 8, 8), float(start))
        rows = torch.tensor([start, start + 1, 0, 1])
        logits, features = say(x=x)
        store.add(rows, 0, logits + rank, features)


def test_two_processes_fill_one_store(store):
    """Each image has all its values from one of the two."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=fill_a_part, args=(store.folder, k)) for k in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert store.has(torch.arange(IMAGES), 0)
    logits = store.read(torch.arange(IMAGES), 0).logits
    for row in range(IMAGES):
        said = say(x=torch.full((1, 3, 8, 8), float(row // 2 * 2)))[0][0]
        distances = [(logits[row] - said - rank).abs().max() for rank in range(2)]
        assert min(distances) < 5e-3


def test_a_copy_opens_the_same_files(store):
    store.add(ROWS, 0, *say())
    narrow = store.select(["two"], MapOptions())
    for copied in (copy.deepcopy(narrow), pickle.loads(pickle.dumps(narrow))):
        assert copied.layers == ["two"]
        assert torch.equal(copied.read(ROWS, 0).logits, store.read(ROWS, 0).logits)


def test_fingerprints_of_networks():
    from attention_transfer.models.trained import Preprocess
    from attention_transfer.store.fingerprint import network_fingerprint

    net, mean, std = teacher(), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    base = network_fingerprint(net, Preprocess(mean, std))
    assert network_fingerprint(teacher(), Preprocess(mean, std)) == base
    others = [
        network_fingerprint(net, Preprocess(mean, mean)),
        network_fingerprint(net, Preprocess(mean, std, (32, 32))),
        network_fingerprint(net),
        network_fingerprint(Net(8, seed=2), Preprocess(mean, std)),
    ]
    assert len({base, *others}) == 5


def test_another_code_is_another_teacher(tmp_path):
    """The weights may be the same."""
    from attention_transfer.models.network import Network
    from attention_transfer.models.trained import Preprocess
    from attention_transfer.store.fingerprint import teacher_record

    file, preprocess = tmp_path / "net.py", Preprocess((0.5,) * 3, (0.2,) * 3)
    network = Network(teacher(), f"{file}:make", ("a", "b"), preprocess)
    prints = []
    for code in ("one", "another", "one"):
        file.write_text(code)
        prints.append(teacher_record(network).fingerprint)
    assert prints[0] == prints[2] != prints[1]


def test_the_folder_of_a_teacher_in_the_package():
    from attention_transfer.models.network import load_run_network
    from attention_transfer.run_folder import ZOO_FOLDER
    from attention_transfer.store.fingerprint import teacher_record

    record = teacher_record(load_run_network("zoo:wrn-16-1-cifar10"))
    assert record.folder == str(ZOO_FOLDER.resolve() / "wrn-16-1-cifar10")


def test_two_preprocessings_are_refused(tmp_path):
    from attention_transfer.models.trained import Preprocess, TrainedNetwork

    net, preprocess = teacher(), Preprocess((0.5,) * 3, (0.2,) * 3)
    inside = TrainedNetwork(net, preprocess, tuple(map(str, range(CLASSES))))
    with pytest.raises(UserError, match="has its preprocessing inside"):
        create_store(
            tmp_path / "s", inside, torch.rand(2, 3, 8, 8), images=2, teacher_transform=preprocess
        )
