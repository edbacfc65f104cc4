"""C3D with batch norm: its grid, its hidden layers, the clips it takes."""

from __future__ import annotations

import pytest
import torch

from models import build


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_last_pool_leaves_a_4x4_grid_of_the_paper_clip():
    with torch.device("meta"):
        model = build("c3d", num_classes=400)
        assert model.trunk(torch.zeros(1, 3, 16, 112, 112)).shape == (1, 512, 1, 4, 4)
    assert model.hidden.fc6.conv.weight.shape[:2] == (4096, 8192)


def test_every_layer_but_the_classifier_has_batch_norm_with_gamma():
    names = [name for name, _ in build("c3d", num_classes=5, width=0.0625, size=32).named_parameters()]
    assert sum(name.endswith("bn.weight") for name in names) == 8 + 2
    assert [name for name in names if name.endswith("conv.bias")] == []


@pytest.mark.parametrize(("frames", "size"), [(16, 64), (8, 33), (40, 32)])
def test_hidden_layers_follow_the_clip_size(frames, size):
    model = build("c3d", num_classes=5, width=0.0625, frames=frames, size=size)
    assert model(torch.randn(2, 3, frames, size, size)).shape == (2, 5)


def test_another_clip_size_is_refused():
    model = build("c3d", num_classes=5, width=0.0625, size=64)
    with pytest.raises(ValueError, match=r"\(16, 64, 64\).*\(16, 112, 112\)"):
        model(torch.zeros(1, 3, 16, 112, 112))
