"""Attention inside boxes, against shares by hand; the maps of networks of several sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import write_factory
from test_export import make_run

import attention_transfer as at
from attention_transfer.apply.inference import InferenceModel, as_input
from attention_transfer.apply.maps import (
    at_centres,
    box_masks,
    gradient_map,
    map_columns,
    peak_inside,
    share_inside,
)
from attention_transfer.models.network import load_trained


def test_attention_inside_a_box():
    inside = torch.zeros(2, 8, 8, dtype=torch.bool)
    inside[:, :, :4] = True
    left = torch.zeros(1, 4, 4)
    left[:, :, 0] = 1
    shares = share_inside(torch.cat([torch.ones(1, 4, 4), left]), inside)
    assert shares.tolist() == pytest.approx([0.5, 1.0])


def test_the_peak_of_a_map_is_the_centre_of_its_largest_cell():
    masks = box_masks(torch.tensor([[0, 0, 16, 16], [16, 16, 17, 17], [20, 0, 64, 16]]), (64, 64))
    cells = at_centres(masks, (2, 2))  # the centres are at pixels 16 and 48
    assert cells.int().tolist() == [[[0, 0], [0, 0]], [[1, 0], [0, 0]], [[0, 0], [0, 0]]]
    maps = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]).repeat(3, 1, 1)
    assert peak_inside(maps, cells).tolist() == [False, True, False]
    whole = torch.ones(2, 2, 2, dtype=torch.bool)
    flat_and_zero = torch.stack([torch.ones(2, 2), torch.zeros(2, 2)])
    assert peak_inside(flat_and_zero, whole).tolist() == [False, False]


def test_a_random_peak_is_in_the_box_as_often_as_a_cell():
    generator = torch.Generator().manual_seed(0)
    masks = box_masks(torch.tensor([[8, 8, 40, 56]]), (64, 64)).expand(4000, 64, 64)
    cells = at_centres(masks, (4, 4))
    rate = peak_inside(torch.rand(4000, 4, 4, generator=generator), cells).float().mean()
    assert rate == pytest.approx(cells.float().mean().item(), abs=0.03)


def test_boxes_are_half_open():
    (mask,) = box_masks(torch.tensor([[1, 0, 3, 2]]), (3, 4))
    assert mask.int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


class TestColumns:
    @pytest.mark.parametrize("images", ["digits", "picture"])
    def test_each_network_sees_its_own_size(self, tmp_path, picture, images):
        """Of data at 32×32, and of a file; a transformer takes one size only."""
        run = str(make_run(tmp_path / "run"))  # at 24×24
        names = [run, "timm/vit_tiny_patch16_224", "torchvision/resnet18", "wrn-10-1"]
        source = picture if images == "picture" else images
        _, columns, _ = map_columns(names, source, 1, "sum", 2.0)
        sizes = [[m.shape[1:] for m in maps.values()] for _, _, maps in columns]
        assert sizes[0] == [(24, 24), (12, 12), (6, 6)]
        assert sizes[1] == [(14, 14)]
        assert sizes[2][-4:] == [(56, 56), (28, 28), (14, 14), (7, 7)]
        assert sizes[3] == [(32, 32), (16, 16), (8, 8)]

    def test_the_maps_of_a_run_do_not_depend_on_its_neighbours(self, tmp_path):
        run = str(make_run(tmp_path / "run"))
        _, (alone,), _ = map_columns([run], "digits", 2, "sum", 2.0)
        _, (beside, _), _ = map_columns([run, "torchvision/resnet18"], "digits", 2, "sum", 2.0)
        assert alone[1] == beside[1]
        for stage, maps in alone[2].items():
            np.testing.assert_allclose(maps, beside[2][stage], rtol=1e-4, atol=1e-6)

    def test_untrained_networks_are_named(self, tmp_path):
        run = str(make_run(tmp_path / "run"))
        _, columns, notes = map_columns([run, "wrn-10-1"], "digits", 1, "sum", 2.0)
        assert [title for title, _, _ in columns] == ["run", "untrained wrn-10-1"]
        assert notes == ["wrn-10-1 has no trained weights: its maps are those of random weights"]

    def test_a_network_that_fails_says_why(self, tmp_path):
        (tmp_path / "net.py").write_text(
            "from torch import nn\n"
            "def make(): return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))\n"
        )
        with pytest.raises(at.UserError, match=r"net.py:make fails on images of 32×32: Runtime"):
            map_columns([f"{tmp_path}/net.py:make"], "digits", 1, "sum", 2.0)


class TestGradient:
    def test_against_the_quotient_of_differences(self, tmp_path):
        """The derivative of the cross-entropy of the predicted class by single pixels."""
        torch.manual_seed(0)
        network = load_trained(make_run(tmp_path / "run", write_factory(tmp_path)), trust_code=True)
        model = InferenceModel(network.module, network.preprocess, "fp32").double().eval()
        x = torch.rand(2, 3, 24, 24, dtype=torch.float64)
        (found,) = gradient_map(model, x[:1])
        with torch.no_grad():
            predicted = model(x[:1]).argmax(1)
        for row, column in ((0, 0), (7, 20)):
            expected = 0.0
            for channel in range(3):
                losses = []
                for step in (1e-3, -1e-3):
                    moved = x[:1].clone()
                    moved[0, channel, row, column] += step
                    logits = model.module(model.preprocess(moved))
                    losses.append(torch.nn.functional.cross_entropy(logits, predicted).item())
                expected += abs(losses[0] - losses[1]) / 2e-3
            assert found[row, column].item() == pytest.approx(expected, rel=1e-4)

    def test_is_one_more_map(self, tmp_path):
        run = str(make_run(tmp_path / "run"))
        _, ((_, _, sums),), _ = map_columns([run], "digits", 2, "sum", 2.0)
        pictures, ((_, _, maps),), _ = map_columns([run], "digits", 2, "gradient", 2.0)
        assert [*maps] == [*sums, "input gradient"]
        assert all((maps[stage] == sums[stage]).all() for stage in sums)
        network = load_trained(run)
        model = InferenceModel(network.module, network.preprocess, "fp32").eval()
        x = as_input(torch.from_numpy(pictures).permute(0, 3, 1, 2))
        np.testing.assert_allclose(
            maps["input gradient"], gradient_map(model, x).numpy(), rtol=1e-3, atol=1e-7
        )
        assert maps["input gradient"].shape == (2, 24, 24)


def test_the_command(command, tmp_path, picture):
    run = make_run(tmp_path / "run")
    line = f"maps {run} wrn-10-1 --images {picture} --kind gradient --out"
    said = command(f"{line} a.svg")
    assert (said.status, said.err) == (0, "")
    assert "wrn-10-1 has no trained weights" in said.out
    text = (tmp_path / "a.svg").read_text()
    assert "untrained wrn-10-1" in text and "input gradient" in text
    for mistake, message in (
        (f"{line} z.txt", "--out z.txt: expected a figure, a file ending in .png, .svg, .pdf"),
        (f"{line} z.png --kind mean", "kind"),
    ):
        said = command(mistake)
        assert said.status == 2 and message in said.err and said.err.count("\n") == 1
    assert not (tmp_path / "z.txt").exists()
