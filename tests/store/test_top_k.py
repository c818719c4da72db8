"""The top k logits: exact at temperature 1 for what is kept, and even for the rest."""

from __future__ import annotations

import math

import pytest
import torch

import attention_transfer as at
from attention_transfer.store import top_k


@pytest.fixture
def logits():
    return 3 * torch.randn(6, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 4, 11])
def test_probabilities_at_temperature_1(logits, k):
    values, classes = top_k.encode(logits, k)
    assert values.shape == (6, k + 1) and classes.shape == (6, k)
    found, expected = top_k.decode(values, classes, 12).softmax(1), logits.softmax(1)
    torch.testing.assert_close(found.gather(1, classes), expected.gather(1, classes))
    rest = torch.ones_like(found).scatter(1, classes, 0).bool()
    for row in range(6):
        even = (1 - expected[row, classes[row]].sum()) / (12 - k)
        torch.testing.assert_close(found[row, rest[row]], even.expand(12 - k))


def test_the_number_for_the_rest_by_its_formula(logits):
    values, classes = top_k.encode(logits, 3)
    for row in range(6):
        others = [logits[row, c].item() for c in range(12) if c not in classes[row].tolist()]
        expected = math.log(sum(math.exp(z) for z in others) / 9)
        assert values[row, -1].item() == pytest.approx(expected, rel=1e-12)


def test_all_but_one_is_all(logits):
    found = top_k.decode(*top_k.encode(logits, 11), 12)
    torch.testing.assert_close(found, logits)


def test_distillation_is_defined_at_every_temperature(logits):
    decoded = top_k.decode(*top_k.encode(logits, 2), 12)
    student = torch.zeros(6, 12, dtype=torch.float64)
    for temperature in (0.5, 1.0, 4.0, 20.0):
        loss = at.kd_loss(student, decoded, temperature)
        assert loss.isfinite() and loss > 0
    # The rest together weighs no less than it did.
    classes = logits.topk(2).indices
    for temperature in (2.0, 4.0):
        kept = (decoded / temperature).softmax(1).gather(1, classes).sum(1)
        exact = (logits / temperature).softmax(1).gather(1, classes).sum(1)
        assert (kept <= exact + 1e-12).all()
