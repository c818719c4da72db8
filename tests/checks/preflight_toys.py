"""Transfers, networks and terms with faults, and what preflight reports of them."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn
from toys import CLASSES, Net, batch, make

import attention_transfer as at
from attention_transfer.checks.preflight import preflight
from attention_transfer.methods.base import Method


class Noisy(Net):
    """Changes all that a training forward can: statistics, dropout, Python's and NumPy's draws."""

    def __init__(self, **options):
        super().__init__(**options)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        x = self.norm(self.one(x)) * (1 + 0.1 * random.random() + 0.1 * np.random.rand())
        return self.fc(self.drop(self.three(self.two(x))).mean((2, 3)))


class Constant(nn.Module):
    """Wraps a layer, and outputs `value` for every input."""

    def __init__(self, layer, value):
        super().__init__()
        self.layer, self.value = layer, value

    def forward(self, x):
        x = self.layer(x)
        return x * 0 + self.value


class Term(Method):
    """A term of the loss: `value` of the student's logits."""

    name = "own"

    def __init__(self, value, weight=1.0):
        super().__init__()
        self.value, self.factor = value, weight

    def forward(self, step):
        return self.value(step.student_logits)

    def weight(self, progress):
        return self.factor(progress) if callable(self.factor) else self.factor

    def weights(self, progress):
        return {"own": float(self.weight(progress))}


def make_at_kd(**options):
    return make(at.ActivationTransfer(), at.KnowledgeDistillation(), **options)


def findings_of(transfer, x=None, y=None, **options):
    """The texts of the findings by level."""
    if x is None:
        x, y = batch(8)
    texts = {"error": [], "warning": [], "note": []}
    for finding in preflight(transfer, x, y, **options):
        texts[finding.level].append(finding.text)
    return texts


def assert_only(level, text, findings):
    """Asserts that there is one finding, of this level and with this text."""
    assert sum(map(len, findings.values())) == 1, findings
    assert len(findings[level]) == 1 and text in findings[level][0], findings


def net_with_constant(name, value, width=4, seed=0):
    net = Net(width, seed=seed)
    setattr(net, name, Constant(getattr(net, name), value))
    return net


def labelled_batches(n, classes=CLASSES):
    """Validation batches of n images, whose number a `KnowingTeacher` can read off the pixels."""
    x = torch.arange(n, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 8, 8) / n
    return [(x[i : i + 100], torch.arange(n)[i : i + 100] % classes) for i in range(0, n, 100)]


class KnowingTeacher(nn.Module):
    """Is right for `right` of every ten images of `labelled_batches(n)`."""

    def __init__(self, n, right, classes=CLASSES):
        super().__init__()
        self.n, self.right, self.classes, self.seen = n, right, classes, 0

    def forward(self, x):
        index = (x[:, 0, 0, 0] * self.n).round().long()
        self.seen += len(x)
        answer = (index + (index // self.classes % 10 >= self.right)) % self.classes
        return nn.functional.one_hot(answer, self.classes).float()
