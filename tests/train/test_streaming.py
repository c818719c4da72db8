"""Runs with streamed images: the same numbers as with resident ones, also when continued."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch.distributed
from small_runs import (
    FLAGS,
    carry_out,
    request_stop,
    rows,
    small,
    stop_after,
    write_factory,
    write_folder,
)

from attention_transfer.apply.evaluate import evaluate_network
from attention_transfer.data.images import make_generator
from attention_transfer.data.stream import Stream
from attention_transfer.errors import UserError
from attention_transfer.train.signals import Interrupted

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "set"
    return f"folder:{write_folder(folder, classes=3, train=12, val=4)}"


def streamed(images, **options):
    options = {
        "stream": "on",
        "workers": 0,
        "limit_train": None,
        "limit_val": None,
        "batch_size": 8,
    } | options
    return small(data=images, **options)


def weights(run):
    return (run / "student.safetensors").read_bytes()


def test_a_streamed_run_is_a_resident_one(images, tmp_path):
    said = carry_out(streamed(images), tmp_path / "streamed")
    assert "images decoded while training, between the steps" in said.splitlines()[0]
    assert (
        "images in memory"
        in carry_out(streamed(images, stream="off"), tmp_path / "resident").splitlines()[0]
    )
    assert rows(tmp_path / "streamed") == rows(tmp_path / "resident")
    assert weights(tmp_path / "streamed") == weights(tmp_path / "resident")


def test_random_resized_crops_stopped_and_continued(images, tmp_path):
    recipe = streamed(images, augment="imagenet", flip=True, crop_scale=[0.3, 1.0])
    carry_out(recipe, tmp_path / "alone")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 6, request_stop)
        with pytest.raises(Interrupted):
            carry_out(recipe, tmp_path / "run")
    # How many workers there are changes nothing.
    carry_out(
        streamed(images, augment="imagenet", flip=True, crop_scale=[0.3, 1.0], workers=2),
        tmp_path / "run",
    )
    assert weights(tmp_path / "run") == weights(tmp_path / "alone") and rows(
        tmp_path / "run"
    ) == rows(tmp_path / "alone")
    # Evaluated as it was validated: resized beyond the centre that is cut out.
    last = rows(tmp_path / "alone")[-1]
    found = evaluate_network(str(tmp_path / "alone"), device="cpu")
    assert found["loss"] == pytest.approx(last["val_loss"], rel=1e-4)


@pytest.mark.parametrize("part", ["train", "val"])
def test_an_unreadable_image_loses_nothing(images, tmp_path, monkeypatch, part):
    """It is met in the second epoch's steps, or where the first epoch is validated."""
    recipe = streamed(images)
    carry_out(recipe, tmp_path / "alone")
    with pytest.MonkeyPatch.context() as patch:
        if part == "train":
            broken = "attention_transfer.data.stream.Stream.batch"

            def fail(self, plan, step, original=Stream.batch):
                if step == 2 and plan.order.tolist() != first.tolist():
                    raise UserError("cannot read the image x")
                return original(self, plan, step)

            first = torch.randperm(36, generator=make_generator(0, 0))
        else:
            broken = "attention_transfer.train.assemble.evaluate"

            def fail(*args):
                raise UserError("cannot read the image x")

        patch.setattr(broken, fail)
        with pytest.raises(
            UserError, match="cannot read the image x; the state is saved: run the command again"
        ):
            carry_out(recipe, tmp_path / "run")
    # The image may be mended by now, or left out.
    said = carry_out(streamed(images, on_bad_image="skip"), tmp_path / "run")
    assert f"at step {6 if part == 'train' else 4} of 8" in said
    assert rows(tmp_path / "run") == rows(tmp_path / "alone")
    assert weights(tmp_path / "run") == weights(tmp_path / "alone")


def test_unreadable_images_are_counted_across_a_stop(images, tmp_path):
    """Each epoch meets the image; the last step, which alone is left, does not."""
    folder = shutil.copytree(images.removeprefix("folder:"), tmp_path / "set")
    (folder / "train" / "class00" / "1.png").write_bytes(b"no image")
    recipe = streamed(f"folder:{folder}", on_bad_image="skip")
    carry_out(recipe, tmp_path / "alone")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 7, request_stop)
        with pytest.raises(Interrupted):
            carry_out(recipe, tmp_path / "run")
    carry_out(recipe, tmp_path / "run")
    counts = [
        json.loads((tmp_path / run / "summary.json").read_text())["skipped_images"]
        for run in ("alone", "run")
    ]
    assert counts == [1, 1]


def test_how_images_were_held_is_kept(images, tmp_path):
    recipe = streamed(images, stream="auto", max_steps=1)
    assert "images in memory" in carry_out(recipe, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["streamed"] is False
    with pytest.raises(UserError, match="holds a run with resident images: leave --stream out"):
        carry_out(streamed(images, max_steps=1), tmp_path / "run")


def test_what_is_cut_off_is_said(images, tmp_path):
    said = carry_out(
        streamed(images.replace("/set", "/set/train"), max_steps=1, val_split=None),
        tmp_path / "run",
    )
    assert "has no validation images: 3 of its 36 training images" in " ".join(said.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"augment": "imagnet"},
            "augment is 'imagnet': expected one of crop, imagenet; did you mean imagenet",
        ),
        ({"stream": "yes"}, "stream is 'yes': expected one of auto, on, off"),
        ({"workers": -1}, "workers is -1: expected a whole number ≥ 0"),
        ({"crop_scale": "0.1,1"}, "--crop-scale is given, but --augment crop has none"),
        (
            {"augment": "imagenet", "crop_padding": 2},
            "--crop-padding is given, but --augment imagenet has none",
        ),
        (
            {"augment": "imagenet", "crop_scale": "a"},
            "crop_scale is 'a': expected LOW,HIGH",
        ),
        (
            {"augment": "imagenet", "crop_ratio": [2, 1]},
            r"crop_ratio is \(2.0, 1.0\): expected LOW,HIGH",
        ),
        ({"augment": "imagenet", "stream": "off"}, "leave --stream off out"),
    ],
)
def test_wrong_words_are_named(options, message):
    with pytest.raises(UserError, match=message):
        small(**options)


def test_built_in_images_are_not_streamed(tmp_path):
    with pytest.raises(
        UserError,
        match=r"digits is read into memory .*leave --stream \(and --augment imagenet\) out",
    ):
        carry_out(small(augment="imagenet"), tmp_path / "run")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_an_image_that_one_of_two_processes_cannot_read(tmp_path):
    folder = write_folder(tmp_path / "set", classes=2, train=8, val=4)
    torn = sorted((folder / "train").rglob("*.png"))[5]
    words = f"train --model {write_factory(tmp_path)} {FLAGS} --data folder:{folder} "
    words += "--stream on --devices 2 --out run"
    torn.write_bytes(torn.read_bytes()[:60])
    said = subprocess.run(
        [sys.executable, "-m", "attention_transfer", *words.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert said.returncode != 0
    assert str(torn) in said.stderr
