"""A store in the teacher's place of a `Transfer`: the same loss as with the teacher itself."""

from __future__ import annotations

import pytest
import torch
from toys import Net, assert_same, batch, gradients

import attention_transfer as at
from attention_transfer.map_inputs import StoredMap
from attention_transfer.methods.registry import METHODS
from attention_transfer.store.store import normalized_map
from attention_transfer.teacher import TeacherOutput

ROWS = torch.tensor([3, 1, 9, 4])
TOLERANCE = {"rtol": 2e-3, "atol": 2e-4}


def teacher():
    return Net(8, seed=1)


def filled(folder, **options):
    """A store that has the images of `batch()` at `ROWS` of view 1."""
    x, _ = batch()
    store = at.create_store(folder, teacher(), x, images=10, views=2, **options)
    with torch.no_grad(), at.tap(teacher(), store.layers) as tapped:
        store.add(ROWS, 1, *tapped(x))
    return store


def both(folder, *methods, dtype="float16", **options):
    """The transfer with the teacher, and with a store; the methods are made anew for each."""
    map_options = next((m().map_options for m in methods if m().map_options is not None), None)
    words = {} if map_options is None else vars(map_options)
    store = filled(folder, dtype=dtype, **words)
    x, _ = batch()
    said = store.read(ROWS, 1)
    live = at.Transfer(Net(), teacher(), [m() for m in methods], example=x, **options)
    kept = at.Transfer(
        Net(), store, [m() for m in methods], example=x, example_teacher=said, **options
    )
    return live, kept


@pytest.mark.parametrize("kind", ["sum", "max"])
@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("convention", ["authors", "paper"])
def test_every_kind_of_map(tmp_path, kind, p, convention):
    def make():
        return at.ActivationTransfer(beta=10, kind=kind, p=p, convention=convention)

    live, kept = both(tmp_path / "store", make, dtype="float32")
    x, y = batch()
    expected, found = live(x, y), kept(x, y, teacher=kept.store.read(ROWS, 1))
    expected.loss.backward()
    found.loss.backward()
    assert kept.pairs == live.pairs and kept.teacher is None
    assert_same(found.parts, expected.parts, rtol=1e-5, atol=1e-6)
    assert_same(gradients(kept), gradients(live), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].needs_teacher])
def test_every_method_learns_from_a_store_or_says_why_not(tmp_path, name):
    method = METHODS[name]
    if method.needs_live_teacher is not None:
        store = filled(tmp_path / "store")
        with pytest.raises(at.UserError, match="cannot learn from a store: it .*; pass the teach"):
            at.Transfer(Net(), store, [method()], example=batch()[0])
        return
    live, kept = both(tmp_path / "store", method, dtype="float32")
    x, y = batch()
    expected = live(x, y, progress=0.2)
    found = kept(x, y, progress=0.2, teacher=kept.store.read(ROWS, 1))
    assert_same(found.parts, expected.parts, rtol=1e-4, atol=1e-5)


def test_half_precision_of_the_sum(tmp_path):
    live, kept = both(
        tmp_path / "store", lambda: at.ActivationTransfer(beta=10), at.KnowledgeDistillation
    )
    x, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        out = kept(x, y, teacher=kept.store.read(ROWS, 1))
    assert all(part.dtype == torch.float32 for part in out.parts.values())
    found = kept(x, y, teacher=kept.store.read(ROWS, 1))
    assert_same(found.parts, live(x, y).parts, **TOLERANCE)


def test_a_student_of_another_size(tmp_path):
    """Resizing a kept map and normalising again gives what resizing the teacher's map gives."""
    pairs = [("two", "one"), ("one", "two")]
    x, y = batch()
    for resize in ("map", "bilinear"):
        live, kept = both(
            tmp_path / resize,
            lambda resize=resize: at.ActivationTransfer(beta=10, resize=resize),
            dtype="float32",
            pairs=pairs,
        )
        found = kept(x, y, teacher=kept.store.read(ROWS, 1))
        assert_same(found.parts, live(x, y).parts, rtol=1e-5, atol=1e-6)
    store = filled(tmp_path / "store")
    methods = [at.ActivationTransfer(beta=10, resize="features")]
    with pytest.raises(at.UserError, match="resize='features' pools the teacher's features"):
        at.Transfer(Net(), store, methods, pairs, batch()[0])
    at.Transfer(Net(), store, methods, [("two", "two")], batch()[0])


def test_maps_over_channels(tmp_path):
    store = filled(tmp_path / "store", axis="channel")
    methods = [at.ActivationTransfer(beta=10, axis="channel")]
    x, y = batch()
    live = at.Transfer(Net(8), teacher(), methods, example=x)
    kept = at.Transfer(Net(8), store, methods, example=x)
    found = kept(x, y, teacher=kept.store.read(ROWS, 1))
    assert_same(found.parts, live(x, y).parts, **TOLERANCE)


@pytest.mark.parametrize("shape", [(4, 6, 8, 8), (4, 16, 6)])
def test_a_kept_map_in_the_place_of_features(shape):
    from attention_transfer.map_options import LossOptions
    from attention_transfer.maps import map_loss

    torch.manual_seed(0)
    student, features = torch.rand(shape), torch.rand(shape)
    options = LossOptions("max", 3.0)
    kept = StoredMap(normalized_map(features, options))
    assert kept.values.shape == (4, 8, 8) if len(shape) == 4 else (4, 4, 4)
    expected = map_loss([student], [features], options)
    torch.testing.assert_close(map_loss([student], [kept], options), expected)


def test_compiled(tmp_path):
    torch.compiler.reset()
    _, kept = both(
        tmp_path / "store", lambda: at.ActivationTransfer(beta=10), at.KnowledgeDistillation
    )
    x, y = batch()
    said = kept.store.read(ROWS, 1)
    eager = kept(x, y, torch.tensor(0.5), teacher=said)
    kept.compile(backend="aot_eager", fullgraph=True)
    assert_same(kept(x, y, torch.tensor(0.5), teacher=said).parts, eager.parts)
    whole = at.Transfer(
        Net(), kept.store, [at.KnowledgeDistillation()], example=x, example_teacher=said
    )
    compiled = torch.compile(whole, backend="aot_eager", fullgraph=True)
    assert_same(compiled(x, y, teacher=said).parts, whole(x, y, teacher=said).parts)


def test_preflight(tmp_path):
    _, kept = both(tmp_path / "store", lambda: at.ActivationTransfer(beta=10))
    x, y = batch()
    said = kept.store.read(ROWS, 1)
    found = at.preflight(kept, x, y, teacher=said)
    assert [f for f in found if f.level == "error"] == []
    dead = said._replace(maps={name: 0 * m for name, m in said.maps.items()})
    found = at.preflight(kept, x, y, teacher=dead)
    assert any("the teacher's layer one is dead" in f.text for f in found)
    with pytest.raises(at.UserError, match="needs its outputs for x"):
        at.preflight(kept, x, y)


def test_calls_that_cannot_work(tmp_path):
    _, kept = both(tmp_path / "store", lambda: at.ActivationTransfer(beta=10))
    x, y = batch()
    with pytest.raises(at.UserError, match=r"call transfer\(x, y, progress, teacher=transfer\.st"):
        kept(x, y)
    with pytest.raises(at.UserError, match="teacher= is an object of type Net"):
        kept(x, y, teacher=teacher())
    with pytest.raises(at.UserError, match=r"the teacher's maps are one\.sum2: expected two\.sum2"):
        kept(x, y, teacher=TeacherOutput(maps={"one.sum2": torch.ones(4, 8, 8)}))
    with pytest.raises(at.UserError, match="the student's batch is 3, the teacher's 4"):
        kept(x[:3], y[:3], teacher=kept.store.read(ROWS, 1))
    with pytest.raises(at.UserError, match="teacher is an object of type str"):
        at.Transfer(Net(), "store", [at.ActivationTransfer(beta=1)], example=x)
    with pytest.raises(at.UserError, match="methods .* use none"):
        at.Transfer(Net(), kept.store, [at.GradientNorm()], example=x)


def test_auto_beta_comes_from_images_that_are_there(tmp_path):
    x, y = batch()
    store = at.create_store(tmp_path / "store", teacher(), x, images=10, dtype="float32")
    with pytest.raises(at.UserError, match="no pair can teach"):
        at.Transfer(Net(), store, [at.ActivationTransfer()], example=x)
    with torch.no_grad(), at.tap(teacher(), store.layers) as tapped:
        store.add(ROWS.sort().values, 0, *tapped(x))
    kept = at.Transfer(Net(), store, [at.ActivationTransfer()], example=x)
    live = at.Transfer(Net(), teacher(), [at.ActivationTransfer()], example=x)
    said = kept.store.read(ROWS.sort().values)
    assert_same(kept(x, y, teacher=said).parts, live(x, y).parts, rtol=1e-4, atol=1e-6)


def test_maps_of_other_images_are_on_the_device_of_the_student(tmp_path, monkeypatch):
    store = filled(tmp_path / "store")
    transfer = at.Transfer(Net(), store, [at.ActivationTransfer(beta=1)], example=batch()[0])
    devices = []

    def sample(count, device="cpu"):
        devices.append(device)
        return store.sample(count, device)

    monkeypatch.setattr(transfer.store, "sample", sample)
    transfer.features(batch()[0])
    assert devices == [torch.device("cpu")]
    assert store.sample(2, "meta").logits.device.type == "meta"
    empty = at.create_store(tmp_path / "empty", teacher(), batch()[0], images=10, views=2)
    output = empty.sample(2, "meta")
    assert {t.device.type for t in (output.logits, *output.maps.values())} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_store_and_auto_beta_on_a_gpu(tmp_path):
    store = filled(tmp_path / "store")
    x, y = (t.cuda() for t in batch())
    known = store.read(ROWS, 1, "cuda")
    methods = [at.ActivationTransfer()]
    transfer = at.Transfer(Net().cuda(), store, methods, example=x, example_teacher=known)
    transfer.features(x)
    transfer(x, y, teacher=known).loss.backward()
    # DDP broadcasts the buffers, and NCCL needs them on the GPU.
    assert {buffer.device.type for buffer in transfer.buffers()} == {"cuda"}
