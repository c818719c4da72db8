"""Each script of the laboratory shows its help, and works at a tiny setting."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import ablation
import decoders
import double_backward
import harness
import numpy as np
import peer_torchdistill
import pytest
import sweep
import sweep_plot
import torch
from lightning.fabric import Fabric
from PIL import Image
from rich.console import Console

import attention_transfer as at
from attention_transfer.bench import gradient
from attention_transfer.bench.measure import BenchRow
from attention_transfer.methods.registry import METHODS

QUIET = Console(quiet=True)
FOLDER = Path(sweep.__file__).parent
SCRIPTS = ("ablation", "decoders", "double_backward", "peer_torchdistill", "sweep", "zoo")


@pytest.fixture
def same_process(monkeypatch, same_process):
    for module in (ablation, peer_torchdistill):
        monkeypatch.setattr(module, "in_subprocess", same_process)


def test_every_script_opens_with_how_to_run_it():
    shared = {FOLDER / "harness.py", FOLDER / "table_files.py"}
    for file in set(FOLDER.glob("*.py")) - shared:
        opening = file.read_text().splitlines()[:6]
        assert any(line.startswith(f"    python bench/{file.name}") for line in opening), file


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(monkeypatch, capsys, script):
    monkeypatch.setattr("sys.argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(FOLDER / f"{script}.py"), run_name="__main__")
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert f"python bench/{script}.py" in text and "--json" in text


def test_the_harness_reads_the_options(monkeypatch, capsys, tmp_path):
    calls = []

    def run(options, console, json_file):
        calls.append((options.rounds, options.steps, json_file))

    monkeypatch.setattr("sys.argv", ["x.py", "--steps", "3", "--json", str(tmp_path / "x.json")])
    harness.main("Help.", run, {"rounds": 5})
    assert calls == [(5, 3, tmp_path / "x.json")]
    monkeypatch.setattr("sys.argv", ["x.py", "--steps", "none"])
    with pytest.raises(SystemExit) as exit:
        harness.main("Help.", run)
    assert exit.value.code == 2
    assert "x.py: steps is 'none': expected a whole number" in capsys.readouterr().err


def test_ablation(tmp_path, small, same_process, read_rows):
    ablation.run(small, QUIET, tmp_path / "a.json")
    rows, _ = read_rows(tmp_path / "a.json", "ablation")
    assert list(rows) == ["authors", "eager", "eager, contiguous, float32"]


@pytest.mark.parametrize("method", peer_torchdistill.METHODS)
def test_torchdistills_step_equals_ours(method):
    pytest.importorskip("torchdistill")
    peer = peer_torchdistill
    theirs = peer.PeerStep("wrn-10-1", "wrn-10-2", method)
    student, teacher = at.create_model("wrn-10-1", 10), at.create_model("wrn-10-2", 10)
    student.load_state_dict(theirs.student.state_dict())
    teacher.load_state_dict(theirs.teacher.state_dict())
    theirs.to("cpu")
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8)
    methods = [at.ActivationTransfer(peer.BETA)]
    if method == "at+kd":
        methods.append(at.KnowledgeDistillation(peer.ALPHA, peer.TEMPERATURE))
    transfer = at.Transfer(student, teacher, methods, example=x)
    parameters = transfer.trainable_parameters()
    optimizer = torch.optim.SGD(parameters, peer.LR, momentum=0.9, weight_decay=5e-4)
    for _ in range(2):
        loss = transfer(x, y).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(theirs(x, y).detach(), loss.detach(), rtol=1e-4, atol=1e-5)


def test_peer(tmp_path, small, same_process, read_rows):
    pytest.importorskip("torchdistill")
    peer_torchdistill.run(small, QUIET, tmp_path / "p.json")
    rows, _ = read_rows(tmp_path / "p.json", "peer")
    kinds = [f"{m} {p}" for m in peer_torchdistill.METHODS for p in ("fp32", "bf16")]
    libraries = ("torchdistill", "ours")
    assert list(rows) == ["authors", *(f"{lib} {kind}" for lib in libraries for kind in kinds)]
    assert all(rows[f"torchdistill {kind}"]["times_peer"] == 1 for kind in kinds)


def test_a_compiled_row_is_compared_with_the_faster_of_theirs():
    rates = {"authors": 1.0, "torchdistill at fp32": 2.0, "torchdistill at bf16": 3.0}
    rates |= {"torchdistill at+kd fp32": 4.0, "ours at compiled": 5.0}
    rows = [BenchRow(name, [rate], [1.0]) for name, rate in rates.items()]
    assert peer_torchdistill.peer_of("ours at compiled", rows).name == "torchdistill at bf16"
    assert peer_torchdistill.peer_of("ours at fp32", rows).name == "torchdistill at fp32"
    assert peer_torchdistill.peer_of("authors", rows).name == "torchdistill at+kd fp32"


def test_peer_without_the_library_names_the_extra(monkeypatch, small):
    monkeypatch.setattr(peer_torchdistill, "find_spec", lambda name: None)
    with pytest.raises(at.UserError, match=r"pip install 'attention-transfer\[peers\]'"):
        peer_torchdistill.run(small, QUIET, None)


@pytest.mark.parametrize("method", double_backward.METHODS)
def test_the_plain_double_backward_equals_ours(method):
    torch.manual_seed(0)
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    plain, student, teacher = (at.create_model("nin-thin-no-bn", 10) for _ in range(3))
    student.load_state_dict(plain.state_dict())
    fabric = Fabric(accelerator="cpu", devices=1)
    double_backward.double_backward_step(method, plain, teacher, (x, y), fabric)()
    term = METHODS[method]()
    if not term.needs_teacher:
        teacher = None
    at.Transfer(student, teacher, [term], example=x)(x, y).loss.backward()
    for a, b in zip(plain.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


def test_double_backward(tmp_path, monkeypatch, small, read_rows):
    monkeypatch.setattr(gradient, "peak_memory", lambda make, device: 1.0)
    options = replace(small, student="nin-thin-no-bn", teacher="nin-thin-no-bn")
    double_backward.run(options, QUIET, tmp_path / "d.json")
    rows, _ = read_rows(tmp_path / "d.json", "double_backward")
    kinds = [
        f"{m}{kind}" for m in double_backward.METHODS for kind in (" plain", " plain tuned", "")
    ]
    assert list(rows) == ["authors", "student", *kinds]


def test_sweep(tmp_path, monkeypatch, small, same_process, read_rows):
    every_point = sweep.make_points

    def few_points(batch, runs):
        chosen = {("batch", batch), ("pairs", 0), ("processes", 2), ("runs", 2)}
        return [point for point in every_point(batch, runs) if point[:2] in chosen]

    monkeypatch.setattr(sweep, "make_points", few_points)
    monkeypatch.setattr(sweep.Point, "options", lambda self, options: small)
    sweep.run(small, QUIET, tmp_path / "s.json")
    rows, result = read_rows(tmp_path / "s.json", "sweep")
    assert list(rows) == ["authors", "batch 8", "pairs 0", "processes 2", "runs 2"]
    for row in result["rows"][1:]:
        assert row["share"] < 1 and row["student_rate"] > 0 and row["authors_rate"] > 0


def test_the_base_is_on_every_axis(small):
    points = sweep.make_points(128)
    assert {axis for axis, _, _ in points} == {"batch", *sweep.AXES, "runs"}
    assert sum(point == sweep.Point(128) for _, _, point in points) == 2 + len(sweep.AXES)
    wide = next(point for axis, value, point in points if (axis, value) == ("width", 3))
    options = wide.options(small)
    assert (options.student, options.teacher) == ("wrn-16-3", "wrn-16-6")


def test_the_share_is_what_the_networks_leave():
    rates = {"authors": 10.0, "step": 100.0, "student": 250.0, "teacher": 500.0}
    measured = {name: BenchRow(name, [rate], [1.0]) for name, rate in rates.items()}
    row = sweep.make_row("batch", 8, measured)
    assert row.extra["share"] == pytest.approx(0.4)  # 10 ms, of which 4 and 2 are the networks'


@pytest.mark.parametrize(("suffix", "limit"), [("png", 60_000), ("svg", 180_000)])
def test_the_plot_of_a_sweep_is_small(tmp_path, suffix, limit):
    rates = {"p10": 900.0, "median": 1000.0, "p90": 1100.0, "authors_rate": 400.0, "share": 0.02}
    rows = [{"name": "authors"}]
    for axis in ("batch", *sweep.AXES):
        rows += [{"axis": axis, "value": value, **rates} for value in (1, 2, 4)]
    file = tmp_path / f"sweep.{suffix}"
    sweep_plot.draw(rows, file)
    assert 1000 < file.stat().st_size < limit


@pytest.fixture
def jpegs(tmp_path):
    """Red and green rise with the column and the row."""
    folder = tmp_path / "jpegs" / "deep"
    folder.mkdir(parents=True)
    y, x = np.mgrid[:300, :400]
    for k in range(3):
        image = np.stack([x // 2, y // 2, (x + y) // (k + 3)], axis=2).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{k}.jpg", quality=95)
    return tmp_path / "jpegs"


def test_decoders(tmp_path, monkeypatch, small, jpegs):
    monkeypatch.setattr(decoders, "available_cores", lambda: 1)
    decoders.run(replace(small, data=str(jpegs)), QUIET, tmp_path / "d.json")
    result = json.loads((tmp_path / "d.json").read_text())
    names = [row["name"] for row in result["rows"]]
    assert names[:2] == ["authors 224", "torchvision 224"]
    for name in (*decoders.DECODERS, "loader dali 224"):
        assert (name in names) != (f"{name}: not installed" in result["notes"])


@pytest.mark.parametrize("name", decoders.DECODERS)
def test_every_library_crops_the_same_picture(name, jpegs):
    module, make = decoders.DECODERS[name]
    pytest.importorskip(module)
    encoded = (jpegs / "deep" / "0.jpg").read_bytes()
    decode = make()
    torch.manual_seed(0)
    flips = 0
    for _ in range(8):
        crop = np.asarray(decode(encoded)).astype(int)
        assert crop.shape == (224, 224, 3)
        assert np.all(np.diff(crop[::32, 112, 1]) > 0)
        columns = np.diff(crop[112, ::32, 0])
        assert np.all(columns > 0) or np.all(columns < 0)
        flips += columns[0] < 0
    assert 0 < flips < 8
