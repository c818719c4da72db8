"""Two runs of the authors' script: the logits, maps and losses of their code, in float32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import attention_transfer as at
from attention_transfer.models.authors_files import read_params

HERE = Path(__file__).resolve().parents[3] / "shared" / "conformance" / "authors_run"
RUNS = {"resnet_16_2_teacher": ("wrn-16-2", None), "at_16_1_16_2": ("wrn-16-1", "wrn-16-2")}
GROUPS = ["group0", "group1", "group2"]
pytestmark = pytest.mark.skipif(
    not HERE.is_dir(), reason="../shared/conformance/authors_run is not there"
)


def expected(run: str) -> dict[str, Tensor]:
    with np.load(HERE / run / "expected.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def features(model: torch.nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.no_grad():
        return at.tap(model, GROUPS)(as_input(images))


def as_input(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float() / 255


def assert_close(ours: Tensor, published: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, published, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("run", RUNS)
def test_logits_and_maps(run: str) -> None:
    loaded, known = at.load_authors_run(HERE / run), expected(run)
    assert (loaded.name, loaded.teacher_name) == RUNS[run]
    logits, found = features(loaded.model, known["images"])
    assert_close(logits, known["logits"], 1e-5)
    with torch.no_grad():
        assert_close(loaded.model(as_input(known["images"])), known["logits"], 1e-5)
    for k, group in enumerate(GROUPS):
        assert_close(at.attention_map(found[group]), known[f"attention.{k}"], 1e-6)


def test_the_teacher_and_the_losses_of_a_distillation() -> None:
    run = "at_16_1_16_2"
    loaded, known = at.load_authors_run(HERE / run), expected(run)
    assert loaded.teacher is not None
    logits, theirs = features(loaded.teacher, known["images"])
    assert_close(logits, known["teacher_logits"], 1e-5)
    _, ours = features(loaded.model, known["images"])
    losses = torch.stack([at.at_loss(ours[group], theirs[group]) for group in GROUPS])
    torch.testing.assert_close(losses.double(), known["at_losses"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("run", RUNS)
def test_the_log(run: str) -> None:
    """Options are in the first line; n_parameters includes the running statistics."""
    options = at.load_authors_run(HERE / run).options
    first = json.loads(
        (HERE / run / "log.txt").read_text().splitlines()[0].removeprefix("json_stats: ")
    )
    assert options == first
    assert f"wrn-{options['depth']}-{options['width']}" == RUNS[run][0]
    student, _ = read_params(HERE / run / "model.pt7")
    assert sum(tensor.numel() for tensor in student.values()) == options["n_parameters"]
