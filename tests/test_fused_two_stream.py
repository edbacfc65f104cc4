"""3D-Fused Two-Stream: both streams, over all snapshots, in one vector."""

from __future__ import annotations

import pytest
import torch

from models import build


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def clips(snapshots=5):
    return {"rgb": torch.randn(2, 3, snapshots, 64, 64), "flow": torch.randn(2, 2, 10 * snapshots, 64, 64)}


def test_fusion_convolves_the_concatenated_grids():
    with torch.device("meta"):
        model = build("fused_two_stream", num_classes=400)
    assert model.fusion.conv.weight.shape == (512, 2048, 3, 3, 3)


@pytest.mark.parametrize(("stream", "frame"), [("rgb", 4), ("flow", 0), ("flow", 49)])
def test_every_frame_of_both_streams_reaches_the_logits(stream, frame):
    model = build("fused_two_stream", num_classes=3, width=0.125, size=64, dropout=0.0)
    inputs = {name: clip.requires_grad_() for name, clip in clips().items()}
    model(inputs).square().sum().backward()
    assert inputs[stream].grad[:, :, frame].abs().max() > 0


def test_a_missing_stream_is_named():
    model = build("fused_two_stream", num_classes=3, width=0.125)
    with pytest.raises(ValueError, match=r"\['rgb'\].*'flow'"):
        model({"rgb": clips()["rgb"]})
