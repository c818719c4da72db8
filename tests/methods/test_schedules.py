"""β and α over the training: falls, warm-up, and what α leaves to the cross-entropy."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from toys import batch, close, make

import attention_transfer as at
from attention_transfer.methods.base import schedule_factor
from attention_transfer.methods.options import DECAYS
from attention_transfer.methods.registry import METHODS

FALLS = {
    "": lambda t: 1.0,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "step": lambda t: 0.2 ** ((t >= 0.3) + (t >= 0.6) + (t >= 0.8)),
}
POINTS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.3, 0.55, 0.6, 0.7, 0.8, 0.99, 1.0)


def by_hand(decay, t):
    if decay == "constant":
        return 1.0
    risen = min(t / 0.1, 1.0) if decay.startswith("warm-up") else 1.0
    return risen * FALLS[decay.removeprefix("warm-up").removeprefix("+")](t)


def test_all_there_are():
    falls = ["linear", "cosine", "step"]
    assert [*DECAYS] == ["constant", *falls, "warm-up", *(f"warm-up+{f}" for f in falls)]


@pytest.mark.parametrize("decay", DECAYS)
def test_values(decay):
    for t in POINTS:
        assert schedule_factor(decay, t) == pytest.approx(by_hand(decay, t), abs=1e-12)
        for dtype in (torch.float32, torch.float64):
            found = schedule_factor(decay, torch.tensor(t, dtype=dtype))
            assert float(found) == pytest.approx(by_hand(decay, t), abs=1e-6)
            assert decay == "constant" or (found.dtype == dtype and found.shape == ())


@pytest.mark.parametrize("decay", [d for d in DECAYS if d.startswith("warm-up")])
def test_warm_up_rises_from_zero(decay):
    rising = [schedule_factor(decay, t / 1000) for t in range(0, 101, 5)]
    assert rising[0] == 0 and rising == sorted(rising) and len(set(rising)) == len(rising)
    falls = decay.removeprefix("warm-up").removeprefix("+") or "constant"
    assert schedule_factor(decay, 0.1) == schedule_factor(falls, 0.1) and schedule_factor(
        decay, 0.5
    ) == schedule_factor(falls, 0.5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("decay", ["warm-up+linear", "step"])
def test_every_method(name, decay):
    x, y = batch()
    transfer, constant = make(METHODS[name](decay=decay)), make(METHODS[name]())
    part = transfer.methods[0].name
    whole, full = constant(x, y).parts[part], constant.weights(None)
    for t in (0.04, 0.5, torch.tensor(0.5)):
        factor = by_hand(decay, float(t))
        torch.testing.assert_close(
            transfer(x, y, t).parts[part], factor * whole, rtol=1e-5, atol=1e-7
        )
        expected = {key: pytest.approx(factor * weight) for key, weight in full.items()}
        assert transfer.weights(t) == expected
    with pytest.raises(at.UserError, match="needs progress"):
        transfer(x, y)


@pytest.mark.parametrize("decay", DECAYS)
def test_what_alpha_loses_the_cross_entropy_gets(decay):
    x, y = batch(dtype=torch.float64)
    methods = [
        at.KnowledgeDistillation(0.9, 3.0, decay=decay),
        at.ActivationTransfer(50, decay="cosine"),
    ]
    transfer = make(*methods, example=None, pairs=[("one", "one")]).double()
    logits, aims = transfer.student(x), transfer.teacher(x)
    for t in POINTS:
        alpha = 0.9 * by_hand(decay, t)
        assert transfer.methods[0].cross_entropy_share(t) == pytest.approx(1 - alpha)
        for given in (t, torch.tensor(t, dtype=torch.float64)):
            parts = transfer(x, y, given).parts
            close(parts["ce"], (1 - alpha) * F.cross_entropy(logits, y))
            close(parts["kd"], alpha * at.kd_loss(logits, aims, 3.0))
            assert transfer.weights(given)["alpha"] == pytest.approx(alpha)
    # Beside a decaying α, β keeps its own schedule.
    assert transfer.weights(0.5)["beta"] == pytest.approx(25)


def test_weights_of_several():
    methods = [at.ActivationTransfer(10, decay="linear"), at.GradientSymmetry(4, decay="warm-up")]
    transfer = make(*methods, at.KnowledgeDistillation(0.5, decay="linear"))
    expected = {"at.beta": 7.5, "symmetry.beta": 4.0, "alpha": 0.375}
    assert transfer.weights(0.25) == pytest.approx(expected) and list(
        transfer.weights(0.25)
    ) == list(expected)
    assert make(methods[0], at.KnowledgeDistillation()).weights(0.25) == pytest.approx(
        {"beta": 7.5, "alpha": 0.9}
    )


@pytest.mark.parametrize(
    ("decay", "nearest"), [("warmup", "warm-up"), ("warm-up+liner", "warm-up+linear")]
)
@pytest.mark.parametrize("name", METHODS)
def test_unknown(name, decay, nearest):
    with pytest.raises(
        at.UserError,
        match=f"unknown decay {re.escape(repr(decay))}.*did you mean {re.escape(nearest)}",
    ):
        METHODS[name](decay=decay)
