"""ConvNet+LSTM: its cell, its causality, its output at every step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import build
from models.convnet_lstm import LSTM


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def test_lstm_equals_pytorchs_with_the_second_bias_zero():
    ours, theirs = LSTM(6, 5), nn.LSTM(6, 5, batch_first=True)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(ours.from_input.weight)
        theirs.weight_hh_l0.copy_(ours.from_hidden.weight)
        theirs.bias_ih_l0.copy_(ours.from_input.bias)
        theirs.bias_hh_l0.zero_()
    x = torch.randn(3, 7, 6)
    torch.testing.assert_close(ours(x), theirs(x)[0])
    assert ours.from_input.bias[5:10].eq(1).all()


@torch.no_grad()
def test_a_later_frame_changes_later_logits_only():
    model = build("convnet_lstm", num_classes=4, width=0.125, size=32).eval()
    clip = torch.randn(1, 3, 5, 32, 32)
    changed = clip.clone()
    changed[:, :, 3] += 1
    before, after = model(clip), model(changed)
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).any(dim=2).all()


def test_a_batch_gives_logits_at_every_step():
    model = build("convnet_lstm", num_classes=4, width=0.125, size=32, frames=3)
    assert model(torch.randn(2, 3, 3, 32, 32)).shape == (2, 3, 4)
    assert model.input_spec.scores_every_step
