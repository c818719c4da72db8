"""A run whose data changed between the kill and the continuation is refused."""

from __future__ import annotations

import json
import shutil

import pytest
from small_runs import carry_out, request_stop, rows, small, stop_after, write_folder

from attention_transfer.data.decode import UnreadableImageError
from attention_transfer.errors import UserError
from attention_transfer.run_folder import RunFolder
from attention_transfer.train.resume import allow_changed_images
from attention_transfer.train.signals import Interrupted

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture
def images(tmp_path):
    return write_folder(tmp_path / "set", classes=4, train=8, val=4)


@pytest.fixture
def recipe(images):
    return small(data=f"folder:{images}", limit_train=None, limit_val=None, batch_size=8)


@pytest.fixture
def stopped(recipe, tmp_path):
    """A run that was stopped in its second epoch."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 5, request_stop)
        with pytest.raises(Interrupted):
            carry_out(recipe, tmp_path / "run")
    return tmp_path / "run"


def environment(run):
    return json.loads((run / "environment.json").read_text())


def halve(images):
    for file in (images / "train").glob("*/[0-3].png"):
        file.unlink()


def swap_classes(images):
    one, two, other = (images / "train" / name for name in ("class00", "class03", "other"))
    one.rename(other)
    two.rename(one)
    other.rename(two)


def remove_class(images):
    for part in ("train", "val"):
        shutil.rmtree(images / part / "class02")


def replace_validation(images):
    shutil.copy(images / "val" / "class00" / "0.png", images / "val" / "class01" / "0.png")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (halve, "it had 32 images and has 16 now"),
        (swap_classes, "its training images or labels differ"),
        (remove_class, "it had 4 classes and has 3 now"),
        (replace_validation, "its validation images or labels differ"),
    ],
)
def test_changed_data_is_refused(images, recipe, stopped, change, problem):
    before = rows(stopped)
    change(images)
    with pytest.raises(UserError, match=rf"folder:.*set has changed since.*{problem}.*put") as said:
        carry_out(recipe, stopped)
    assert "\n" not in str(said.value) and "choose another --out" in str(said.value)
    assert rows(stopped) == before


def test_the_same_data_elsewhere_continues(images, recipe, stopped, tmp_path):
    images.rename(tmp_path / "moved")
    images.symlink_to(tmp_path / "moved")
    assert "continuing" in carry_out(recipe, stopped)


def test_a_run_without_a_record_continues_and_gets_one(images, recipe, stopped):
    recorded = environment(stopped)
    assert recorded["data"]["images"] == 32
    older = {key: value for key, value in recorded.items() if key != "data"}
    (stopped / "environment.json").write_text(json.dumps(older))
    assert "continuing" in carry_out(recipe, stopped)
    assert environment(stopped) == recorded


def test_a_run_without_a_checkpoint_starts_anew(images, recipe, stopped):
    for file in stopped.glob("checkpoint*.pt"):
        file.unlink()
    halve(images)
    assert "continuing" not in carry_out(recipe, stopped)
    assert environment(stopped)["data"]["images"] == 16


@pytest.mark.parametrize("deleted", [False, True])
def test_an_image_that_could_not_be_read_may_be_mended(images, tmp_path, deleted):
    recipe = small(
        data=f"folder:{images}",
        limit_train=None,
        limit_val=None,
        batch_size=8,
        stream="on",
        workers=0,
    )
    file = images / "train" / "class01" / "5.png"
    whole = file.read_bytes()

    def damage(trainer):
        file.write_bytes(whole[:60])

    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 4, damage)
        with pytest.raises(UserError, match=r"class01/5\.png.*the state is saved"):
            carry_out(recipe, tmp_path / "run")
    assert environment(tmp_path / "run")["data"]["fingerprint"] is None
    if deleted:
        file.unlink()
        with pytest.raises(UserError, match="it had 32 images and has 31 now"):
            carry_out(recipe, tmp_path / "run")
    file.write_bytes(whole + b" ")
    assert "continuing" in carry_out(recipe, tmp_path / "run")
    assert environment(tmp_path / "run")["data"]["fingerprint"] is not None


def test_only_an_unreadable_image_lets_the_data_change(stopped):
    """And one process writes so, though all of them raise."""
    before = environment(stopped)
    folder = RunFolder(stopped)
    for error, writes in ((UserError("other"), True), (UnreadableImageError("image"), False)):
        with pytest.raises(UserError), allow_changed_images(folder, writes):
            raise error
        assert environment(stopped) == before
    with pytest.raises(UserError), allow_changed_images(folder, writes=True):
        raise UnreadableImageError("image")
    assert environment(stopped)["data"]["fingerprint"] is None
