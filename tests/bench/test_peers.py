"""The benches against libraries, in whole runs and over sizes: that they work, and compare like with like."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import attention_transfer as at
from attention_transfer.bench import (
    compile,
    data,
    decoders,
    peer,
    scale,
    scale_plot,
    speed,
    teacher,
)
from attention_transfer.bench.authors import AuthorsInference
from attention_transfer.bench.measure import Row, interleave

SMALL = speed.Settings(
    "wrn-10-1", "wrn-10-1", batch_size=8, rounds=1, steps=1, images=24, device="cpu", compile="off"
)
QUIET = Console(quiet=True)
FILES = (decoders.AUTHORS, decoders.OURS)


def rows_of(file, bench):
    found = json.loads(file.read_text())
    assert found["bench"] == bench and found["hardware"]["cores"]
    assert found["rows"][0]["name"] == "authors" and found["rows"][0]["times_authors"] == 1
    for row in found["rows"]:
        assert 0 < row["p10"] <= row["median"] <= row["p90"]
    return {row["name"]: row for row in found["rows"]}, found


@pytest.fixture
def nearby(monkeypatch):
    """What is compared with runs in this process: that it runs in one of its own is seen by test_speed.py."""

    @contextmanager
    def here(make, settings, device, data=None, size=32, warm=True):
        step, x = make().to(device), torch.rand(settings.batch_size, 3, size, size)
        y = torch.randint(10, (settings.batch_size,))

        def rate():
            start = time.perf_counter()
            step(x, y)
            return settings.batch_size / (time.perf_counter() - start)

        yield rate

    for module in (teacher, peer, scale):
        monkeypatch.setattr(module, "elsewhere", here)


def test_ratios_are_to_what_a_row_is_compared_with():
    rates = {"authors": lambda: 2.0, "a": lambda: 6.0, "base": lambda: 4.0, "b": lambda: 12.0}
    rows = interleave(rates, 2, {"base": "base", "b": "base"})
    assert [row.ratios for row in rows] == [[1, 1], [3, 3], [1, 1], [3, 3]]


def test_teacher(tmp_path, nearby):
    teacher.bench_teacher(SMALL, QUIET, tmp_path / "t.json")
    rows, _ = rows_of(tmp_path / "t.json", "teacher")
    assert list(rows) == ["authors", *(f.name for f in teacher.FORMS if not f.compiled)]
    for name in ("authors", "eager fp32", "eager fp32 channels_last"):
        assert rows[name]["logits_error"] < 1e-5 and rows[name]["maps_error"] < 1e-5
    assert 1e-4 < rows["eager bf16 channels_last"]["logits_error"] < 0.1


def test_the_authors_inference_is_the_teachers():
    net = teacher.calibrated("wrn-10-2")
    x = torch.rand(2, 3, 32, 32)
    logits, groups = AuthorsInference("wrn-10-2", state=dict(net.state_dict()))(x)
    with torch.no_grad(), at.tap(net, ["group0", "group1", "group2"], x) as tapped:
        expected, features = tapped(x)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for found, feature in zip(groups, features.values(), strict=True):
        torch.testing.assert_close(found, feature, rtol=1e-4, atol=1e-4)


def test_errors_are_a_share_of_the_largest_value():
    true = (
        torch.tensor([[1.0, -4.0]], dtype=torch.float64),
        [torch.ones(1, 1, 2, 2, dtype=torch.float64)],
    )
    found = torch.tensor([[1.0, -3.0]]), [torch.ones(1, 1, 2, 2) * 7]
    assert teacher.error(found, true) == {
        "logits_error": 0.25,
        "maps_error": pytest.approx(0, abs=1e-7),
    }


@pytest.fixture
def jpegs(tmp_path):
    folder = tmp_path / "jpegs" / "deep"
    folder.mkdir(parents=True)
    y, x = np.mgrid[:300, :400]
    for k in range(3):
        picture = np.stack([x // 2, y // 2, (x + y) // (k + 3)], axis=2).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{k}.jpg", quality=95)
    return tmp_path / "jpegs"


def test_data(tmp_path, jpegs, monkeypatch):
    monkeypatch.setattr(data, "cores_here", lambda: 1)
    file = tmp_path / "d.json"
    settings = speed.Settings(
        batch_size=8, rounds=1, steps=2, images=16, device="cpu", data=str(jpegs)
    )
    data.bench_data(settings, QUIET, file)
    rows, found = rows_of(file, "data")
    there = {"authors", "resident", *FILES, "loader authors 224", "loader torchvision 224"}
    assert (
        there <= rows.keys() and rows["authors 224"]["times_authors"] == 1 and found["files"] == 3
    )
    for name in decoders.OTHERS:
        assert (name in rows) != (f"{name}: not installed" in found["said"])


@pytest.mark.parametrize("name", [*FILES, *decoders.OTHERS])
def test_every_library_makes_a_crop_of_the_same_picture(name, jpegs):
    """Red and green tell the column and the row in the picture: a crop has them rising, or falling where flipped."""
    found, absent = decoders.decoders()
    if name in absent:
        pytest.skip(f"{name} is not installed")
    encoded = (jpegs / "deep" / "0.jpg").read_bytes()
    torch.manual_seed(0)
    flips = 0
    for _ in range(8):
        made = np.asarray(found[name](encoded)).astype(int)
        assert made.shape == (224, 224, 3)
        assert np.all(np.diff(made[::32, 112, 1]) > 0)
        columns = np.diff(made[112, ::32, 0])
        assert np.all(columns > 0) or np.all(columns < 0)
        flips += columns[0] < 0
    assert 0 < flips < 8


def test_the_photographs_are_jpegs_where_no_folder_is_given(tmp_path):
    with data._jpegs(None) as files:
        assert len(files) == data.MADE and Image.open(files[0]).size == (500, 375)
    assert not files[0].exists()
    for folder, match in (
        (str(tmp_path), "no JPEG in it"),
        (str(tmp_path / "none"), "expected a folder of JPEGs"),
    ):
        with pytest.raises(at.UserError, match=match), data._jpegs(folder):
            pass


def test_compile(tmp_path, monkeypatch):
    monkeypatch.setattr(compile, "_authors", lambda settings, device, images: 100.0)
    monkeypatch.setattr(compile.Case, "__call__", pretended)
    compile.bench_compile(speed.Settings(**vars(SMALL) | {"steps": 24}), QUIET, tmp_path / "c.json")
    rows, found = rows_of(tmp_path / "c.json", "compile")
    kinds = ("off", "on first", "on second", "auto")
    long, short = ([f"{kind} {length}" for kind in kinds] for length in ("long", "short"))
    assert list(rows) == ["authors", *long, "authors short", *short]
    assert rows["on first long"]["times_off"] == 2 and rows["off long"]["seconds"] == pytest.approx(
        24 * 8 / 50
    )
    assert rows["auto short"]["times_off"] == pytest.approx(1.25)
    assert "auto short: did not compile, 1.25 of off's time: BEYOND 1.10" in found["said"]
    assert "cache long: 3 files built by the first run, 0 by the second: reused" in found["said"]


def pretended(case):
    case.built.append(3 if case.name.startswith("on first") else 0)
    case.compiled.append(case.mode == "on")
    return {"off": 50.0, "on": 25.0, "auto": 40.0}[case.mode]


def test_a_case_of_compile_is_a_whole_run(tmp_path, monkeypatch):
    torch.save(at.create_model("wrn-10-1", 10).state_dict(), tmp_path / "teacher.pt")
    case = compile.Case("off short", "off", 2, SMALL, tmp_path)
    start = time.perf_counter()
    images_per_second = case()
    assert 2 * 8 / images_per_second <= time.perf_counter() - start
    assert case.built == [0] and case.compiled == [False]
    monkeypatch.setattr(compile, "words", lambda *_: ["distil"])
    with pytest.raises(
        at.RunError,
        match="'off short' failed: attention-transfer: unknown command 'distil'; did you",
    ):
        case()


def test_machine_code_is_counted(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/kernel.so", "a/kernel.cpp", "graph"):
        (tmp_path / name).touch()
    assert compile._machine_code(tmp_path) == 1


@pytest.mark.parametrize("method", peer.METHODS)
def test_torchdistills_step_and_ours_are_one_computation(method):
    pytest.importorskip(peer.PEER)
    theirs = peer.PeerStep("wrn-10-1", "wrn-10-2", method)
    student, ours_teacher = at.create_model("wrn-10-1", 10), at.create_model("wrn-10-2", 10)
    student.load_state_dict(theirs.student.state_dict())
    ours_teacher.load_state_dict(theirs.teacher.state_dict())
    theirs.to("cpu")
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8)
    methods = [at.ActivationTransfer(peer.BETA)]
    methods += [at.KnowledgeDistillation(peer.ALPHA, peer.TEMPERATURE)] if method == "at+kd" else []
    transfer = at.Transfer(student, ours_teacher, methods, example=x)
    optimizer = torch.optim.SGD(
        transfer.trainable_parameters(), peer.RATE, momentum=0.9, weight_decay=5e-4
    )
    for _ in range(2):
        loss = transfer(x, y).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(theirs(x, y).detach(), loss.detach(), rtol=1e-4, atol=1e-5)


def test_peer(tmp_path, nearby):
    pytest.importorskip(peer.PEER)
    peer.bench_peer(SMALL, QUIET, tmp_path / "p.json")
    rows, _ = rows_of(tmp_path / "p.json", "peer")
    kinds = [f"{m} {p}" for m in peer.METHODS for p in ("fp32", "bf16")]
    assert list(rows) == [
        "authors",
        *(f"{who} {kind}" for who in (peer.PEER, "ours") for kind in kinds),
    ]
    assert all(rows[f"{peer.PEER} {kind}"]["times_peer"] == 1 for kind in kinds)


def test_peer_without_the_library_names_the_extra(monkeypatch):
    monkeypatch.setattr(peer, "find_spec", lambda name: None)
    with pytest.raises(
        at.UserError,
        match=r"torchdistill, which is not installed: pip install 'attention-transfer\[pe",
    ):
        peer.bench_peer(SMALL, QUIET, None)


def test_scale(tmp_path, monkeypatch, nearby):
    monkeypatch.setattr(scale, "AXES", {"pairs": (0, 3), "processes": (1, 2)})
    monkeypatch.setattr(scale.Point, "settings", lambda self, settings: SMALL)
    monkeypatch.setattr(scale, "points", few_points)
    scale.bench_scale(SMALL, QUIET, tmp_path / "s.json", tmp_path / "s.png")
    rows, _ = rows_of(tmp_path / "s.json", "scale")
    assert list(rows) == ["authors", "batch 8", "pairs 0", "processes 2", "runs 2"]
    for name, row in rows.items():
        if name != "authors":
            assert row["share"] < 1 and row["student_rate"] > 0 and row["authors_rate"] > 0
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"


def few_points(batch, runs):
    wanted = {("batch", batch), ("pairs", 0), ("processes", 2), ("runs", 2)}
    return [p for p in POINTS(batch, runs) if p[:2] in wanted]


POINTS = scale.points


def test_points_share_their_base():
    found = scale.points(128)
    assert {axis for axis, _, _ in found} == {"batch", *scale.AXES, "runs"}
    assert sum(point == scale.Point(128) for _, _, point in found) == 2 + len(scale.AXES)
    wide = next(p for axis, value, p in found if (axis, value) == ("width", 3))
    assert wide.settings(SMALL).student == "wrn-16-3" and wide.settings(SMALL).teacher == "wrn-16-6"


def test_the_share_is_what_the_parts_leave():
    def row(rate):
        return Row("", [rate], [1.0])

    found = {"authors": row(10.0), "step": row(100.0), "student": row(250.0), "teacher": row(500.0)}
    assert scale._row("a", found, {}).more["share"] == pytest.approx(
        0.4
    )  # 10 ms, of which 4 and 2 are the networks'


def test_the_picture_is_light(tmp_path):
    where = [(axis, v) for axis in ("batch", *scale.AXES) for v in (1, 2, 4)]
    rates = {"p10": 900.0, "median": 1000.0, "p90": 1100.0, "authors_rate": 400.0, "share": 0.02}
    rows = [{"name": "authors"}, *({"axis": axis, "value": v, **rates} for axis, v in where)]
    for suffix in ("png", "svg"):
        file = tmp_path / f"scale.{suffix}"
        scale_plot.draw(rows, file)
        assert 1000 < file.stat().st_size < 60_000 * (1 if suffix == "png" else 3)
