"""Baselines run in a process of their own."""

import os

import pytest
import torch

from attention_transfer import RunError
from attention_transfer.bench.authors import authors_step
from attention_transfer.bench.in_subprocess import in_subprocess


class Dying:
    """A step that ends its process."""

    def to(self, device):
        return self

    def __call__(self, x, y):
        os._exit(3)


def test_the_authors_step_with_its_loader(small):
    images = torch.zeros(16, 32, 32, 3, dtype=torch.uint8).numpy()
    with authors_step(small, "cpu", (images, torch.zeros(16).numpy())) as measure:
        assert measure() > 0 and measure() > 0


def test_a_process_that_dies_is_an_error(small):
    process = in_subprocess(Dying, small, "cpu")
    with process as measure, pytest.raises(RunError, match="subprocess of the bench died"):
        measure()
