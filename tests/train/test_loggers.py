"""`--log`: every epoch once, also in a continued run; a logger that fails stops no run."""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec

import pytest
from small_runs import STEPS_PER_EPOCH, carry_out, request_stop, rows, small, stop_after

from attention_transfer.config import make_recipe
from attention_transfer.errors import UserError
from attention_transfer.run_folder import RunFolder, find_runs
from attention_transfer.train import loggers
from attention_transfer.train.loggers import Loggers, flatten_row
from attention_transfer.train.signals import Interrupted

pytestmark = pytest.mark.usefixtures("quick_runs")


def logged(run):
    with (run / "logs" / "csv" / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def expected(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [flatten_row(row) | {"step": row["step"]} for row in lines]


def test_a_row_of_numbers():
    row = {
        "epoch": 2,
        "step": 8,
        "lr": 0.1,
        "parts": {"ce": 1.5, "at": 0.5},
        "weights": {"at": 10.0},
        "word": "x",
    }
    assert flatten_row(row) == {
        "epoch": 2,
        "lr": 0.1,
        "parts/ce": 1.5,
        "parts/at": 0.5,
        "weights/at": 10.0,
    }


def test_every_epoch_once(tmp_path):
    carry_out(small(log="csv"), tmp_path / "run")
    assert (
        logged(tmp_path / "run") == expected(tmp_path / "run")
        and len(logged(tmp_path / "run")) == 2
    )


def test_continued(tmp_path):
    """Started without a logger, interrupted, and continued with one."""
    recipe = small(epochs=3)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, STEPS_PER_EPOCH + 3, request_stop)
        with pytest.raises(Interrupted):
            carry_out(recipe, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2 * STEPS_PER_EPOCH + 1, request_stop)
        with pytest.raises(Interrupted):
            carry_out(small(epochs=3, log="csv"), tmp_path / "run")
    assert len(logged(tmp_path / "run")) == 2
    carry_out(small(epochs=3, log="csv"), tmp_path / "run")
    assert [row["epoch"] for row in logged(tmp_path / "run")] == [1, 2, 3]
    assert logged(tmp_path / "run") == expected(tmp_path / "run")
    carry_out(recipe, tmp_path / "alone")  # what is logged changes nothing
    assert rows(tmp_path / "run") == rows(tmp_path / "alone")


class Fake:
    """In the place of a logger that appends."""

    def __init__(self, broken=False):
        self.steps, self.broken, self.experiment = [], broken, True

    def log_metrics(self, metrics, step):
        if self.broken:
            raise OSError("no route to host")
        self.steps.append(step)

    def save(self):
        pass

    def finalize(self, status):
        self.status = status


def test_what_appends_gets_no_step_twice(tmp_path, monkeypatch):
    said, fakes = [], [Fake(), Fake()]
    monkeypatch.setattr(loggers, "_begin", lambda name, folder, state, options: fakes.pop(0))
    written = [{"epoch": i, "step": 4 * i} for i in range(1, 5)]
    first, second = fakes
    Loggers(["tensorboard"], RunFolder(tmp_path), {}, said.append).write(written[:2])
    again = Loggers(["tensorboard"], RunFolder(tmp_path), {}, said.append)
    again.write(written[:2])
    again.write(written)
    again.close("success")
    assert (
        first.steps == [4, 8]
        and second.steps == [12, 16]
        and second.status == "success"
        and not said
    )


def test_a_logger_that_fails_is_done_without(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "_begin", lambda *args: Fake(broken=True))
    monkeypatch.setattr(loggers, "PACKAGES", {})
    said = carry_out(small(log="tensorboard"), tmp_path / "run")
    assert (
        " ".join(said.split()).count("--log tensorboard failed (no route to host): the run goes on")
        == 1
    )
    assert RunFolder(tmp_path / "run").finished


def test_a_logger_that_cannot_start(tmp_path, monkeypatch):
    def begin(*args):
        raise RuntimeError("no API key\nand more")

    monkeypatch.setattr(loggers, "_begin", begin)
    monkeypatch.setattr(loggers, "PACKAGES", {})
    with pytest.raises(
        UserError,
        match=r"--log wandb cannot start \(no API key\): expected a key .wandb login.*offline",
    ):
        carry_out(small(log="wandb"), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_wrong_words_and_missing_packages(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="unknown logger 'tensorbord'.*did you mean tensorboard"):
        small(log="csv,tensorbord")
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    message = (
        r"--log tensorboard needs the package tensorboard: "
        r"pip install 'attention-transfer\[tensorboard\]'"
    )
    with pytest.raises(UserError, match=message):
        carry_out(small(log="csv,tensorboard"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs the extra tensorboard")
def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, STEPS_PER_EPOCH + 3, request_stop)
        with pytest.raises(Interrupted):
            carry_out(small(log="tensorboard"), tmp_path / "run")
    carry_out(small(log="tensorboard"), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("val_loss")]
    assert found == [
        (row["step"], pytest.approx(row["val_loss"])) for row in expected(tmp_path / "run")
    ]

    (image,) = events.Images("attention maps")
    assert image.step == expected(tmp_path / "run")[-1]["step"]
    assert image.encoded_image_string.startswith(b"\x89PNG")


@pytest.mark.skipif(find_spec("mlflow") is None, reason="needs the extra mlflow")
def test_mlflow(tmp_path, monkeypatch):
    """Interrupted and continued; the picture of the maps is among the run's files."""
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, STEPS_PER_EPOCH + 3, request_stop)
        with pytest.raises(Interrupted):
            carry_out(small(log="mlflow"), tmp_path / "run")
    carry_out(small(log="mlflow"), tmp_path / "run")
    client = MlflowClient(f"sqlite:///{tmp_path}/run/logs/mlflow.db")
    experiment = client.get_experiment_by_name("attention-transfer")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.status, found.data.params["model"]) == ("FINISHED", "wrn-10-1")
    values = client.get_metric_history(found.info.run_id, "val_loss")
    assert [(value.step, value.value) for value in values] == [
        (row["step"], pytest.approx(row["val_loss"])) for row in expected(tmp_path / "run")
    ]
    files = client.list_artifacts(found.info.run_id)
    assert [file.path for file in files] == ["attention-maps.png"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]  # nothing in the current folder


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs the extra wandb")
def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    carry_out(small(log="wandb"), tmp_path / "run")
    (folder,) = (tmp_path / "run" / "logs" / "wandb").glob("offline-run-*")
    assert list(folder.glob("run-*.wandb"))
    pictures = list((folder / "files" / "media" / "images").glob("attention maps_*.png"))
    assert len(pictures) == 1


def test_a_picture_that_cannot_be_drawn(tmp_path, monkeypatch):
    def fail(folder, out):
        raise ValueError("no room\nfor it")

    monkeypatch.setattr(loggers, "_begin", lambda *args: Fake())
    monkeypatch.setattr(loggers, "PACKAGES", {"tensorboard": ()})
    monkeypatch.setattr("attention_transfer.launch.save_run_maps", fail)
    said = carry_out(small(log="tensorboard"), tmp_path / "run")
    assert "warning: the attention maps were not logged (no room)" in " ".join(said.split())
    assert RunFolder(tmp_path / "run").finished


def test_what_a_logger_keeps_is_no_run(tmp_path):
    for place in ("a", "a/logs/wandb/files"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.yaml").write_text("model: wrn-10-1\n")
    assert [run.path for run in find_runs([tmp_path])] == [tmp_path / "a"]


def test_it_is_no_other_run():
    plain = {"model": "wrn-10-1"}
    assert (
        make_recipe(plain).identity()
        == make_recipe(plain, {"log": "csv", "on_bad_image": "skip"}).identity()
    )
