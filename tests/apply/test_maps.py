"""Attention inside boxes, against shares by hand."""

from __future__ import annotations

import pytest
import torch

from attention_transfer.apply.maps import box_masks, share_inside


def test_attention_inside_a_box():
    inside = torch.zeros(2, 8, 8, dtype=torch.bool)
    inside[:, :, :4] = True
    left = torch.zeros(1, 4, 4)
    left[:, :, 0] = 1
    shares = share_inside(torch.cat([torch.ones(1, 4, 4), left]), inside)
    assert shares.tolist() == pytest.approx([0.5, 1.0])


def test_boxes_are_half_open():
    (mask,) = box_masks(torch.tensor([[1, 0, 3, 2]]), (3, 4))
    assert mask.int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
