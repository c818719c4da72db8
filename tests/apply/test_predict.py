"""`predict`: the run's network on image files, against the same by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from authors_files import write_run, wrn, wrn_params
from PIL import Image
from small_runs import write_folder
from test_export import CLASSES, MEAN, STD, make_run

import attention_transfer as at
from attention_transfer.apply.predict import predict_files
from attention_transfer.data.image_folder import list_files


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def picture(file, size=(24, 24), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return torch.from_numpy(pixels)


def by_hand(run, pixels):
    """Probabilities (N, K) of uint8 images (N, H, W, 3) at the run's size."""
    x = (pixels.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(
        STD
    ).view(3, 1, 1)
    with torch.no_grad():
        return at.load_student(run).network(x).softmax(1)


def test_probabilities(run, tmp_path):
    files = [tmp_path / "data" / name for name in ("b.png", "a.bmp", "deep/c.PNG")]
    pixels = torch.stack([picture(file, seed=i) for i, file in enumerate(files)])
    (tmp_path / "data" / "notes.txt").write_text("no image")
    found = predict_files(run, [tmp_path / "data"], top=3)
    # A folder's images come sorted.
    order = [1, 0, 2]
    assert [row["file"] for row in found] == [str(files[i]) for i in order]
    for row, expected in zip(found, by_hand(run, pixels)[order], strict=True):
        assert [p["class"] for p in row["predictions"]] == [
            CLASSES[i] for i in expected.argsort(descending=True)
        ]
        given = {p["class"]: p["probability"] for p in row["predictions"]}
        assert [given[c] for c in CLASSES] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)


def test_the_images_of_a_folder_are_those_of_folder_data(run, tmp_path):
    """Files of the system beside the images, and in hidden folders, are no images."""
    data = tmp_path / "data"
    picture(data / "dog" / "a.jpg")
    picture(data / "dog" / "b.PGM")
    for hidden in ("dog/._a.jpg", ".thumbs/a.jpg"):
        (data / hidden).parent.mkdir(exist_ok=True)
        (data / hidden).write_bytes(b"of the system")
    (data / "folder.png").mkdir()
    found = [row["file"] for row in predict_files(run, [data])]
    assert found == [str(data / "dog" / "a.jpg"), str(data / "dog" / "b.PGM")]
    listed, _ = list_files(tmp_path, "data", ["dog"])
    assert [str(file) for file in listed] == found


def test_other_sizes_are_resized_and_cropped(run, tmp_path):
    """The shorter side to 24, then the centre: of 24×40 the columns 8 to 32."""
    wide = picture(tmp_path / "wide.png", (24, 40))
    (row,) = predict_files(run, [tmp_path / "wide.png"])
    expected = by_hand(run, wide[None, :, 8:32])[0]
    assert row["predictions"][0]["probability"] == pytest.approx(expected.max().item(), rel=1e-4)
    assert len(row["predictions"]) == 3


def test_more_than_a_batch_and_a_file_twice(run, tmp_path, monkeypatch):
    monkeypatch.setattr("attention_transfer.apply.predict.BATCH", 4)
    folder = write_folder(tmp_path / "data", classes=2, train=5, val=1)
    together = predict_files(
        run, [folder, folder / "train", folder / "val" / "class00" / "0.png"], top=1
    )
    assert len(together) == 12
    for row in together:
        assert len(row["predictions"]) == 1
        (alone,) = predict_files(run, [folder / row["file"]], top=1)
        assert alone["predictions"][0]["probability"] == pytest.approx(
            row["predictions"][0]["probability"], rel=1e-4
        )


def test_unreadable_files_are_named(run, tmp_path):
    files = [tmp_path / "data" / f"{i}.png" for i in range(3)]
    for file in files:
        picture(file)
    files[0].write_bytes(files[0].read_bytes()[:200])
    files[2].write_bytes(b"")
    with pytest.raises(at.UserError) as error:
        predict_files(run, [tmp_path / "data"])
    assert f"cannot read 2 of 3 images ({files[0]}, {files[2]})" in str(error.value)


def test_missing_images_and_runs(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for paths, text in (
        ([tmp_path / "none.png"], "none.png does not exist"),
        ([tmp_path / "empty"], "no image in"),
        ([run / "config.yaml"], "cannot read 1 of 1 images"),
    ):
        with pytest.raises(at.UserError, match=text):
            predict_files(run, paths)
    picture(tmp_path / "a.png")
    with pytest.raises(at.UserError, match="--top is 0"):
        predict_files(run, [tmp_path / "a.png"], top=0)
    with pytest.raises(at.UserError, match="not a run folder"):
        predict_files(tmp_path, [tmp_path / "a.png"])


def test_a_run_of_the_authors(tmp_path):
    folder = write_run(tmp_path / "r", params := wrn_params(10, 1))
    pixels = picture(tmp_path / "a.png", (32, 32)).float()
    mean, std = torch.tensor([125.3, 123.0, 113.9]), torch.tensor([63.0, 62.1, 66.7])
    expected = wrn(((pixels - mean) / std).permute(2, 0, 1)[None], params)[0].softmax(1)[0]
    (row,) = predict_files(folder, [tmp_path / "a.png"], top=10)
    given = [p["probability"] for p in sorted(row["predictions"], key=lambda p: int(p["class"]))]
    assert given == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-6)


def test_the_command(command, run, tmp_path):
    picture(tmp_path / "a.png")
    answer = command(f"predict {run} a.png --top 2 --json found.json")
    (row,) = predict_files(run, [tmp_path / "a.png"], top=2)
    first, second = row["predictions"]
    shown = ", ".join(f"{p['class']} {100 * p['probability']:.1f} %" for p in (first, second))
    assert (answer.status, answer.err, answer.out) == (0, "", f"a.png: {shown}\n")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {"run": str(run), "images": [row | {"file": "a.png"}]}
    for line in (f"predict {run} none.png", f"predict {run}", f"predict {run} a.png --device gpu"):
        answer = command(line)
        assert answer.status == 2 and answer.err.count("\n") == 1
