"""Two-Stream: how flow is stacked, how streams and snapshots are summed up."""

from __future__ import annotations

import pytest
import torch

from models import build
from models.two_stream import stack_flow


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def test_flow_is_stacked_frame_by_frame_u_before_v():
    flow = torch.randn(2, 2, 30, 4, 5)
    stacks = stack_flow(flow)
    assert stacks.shape == (2, 20, 3, 4, 5)
    assert torch.equal(stacks[:, 0, 1], flow[:, 0, 10])
    assert torch.equal(stacks[:, 1, 1], flow[:, 1, 10])
    assert torch.equal(stacks[:, 18, 2], flow[:, 0, 29])


def test_flow_that_fills_no_stack_is_refused():
    with pytest.raises(ValueError, match="11 frames does not divide into stacks of 10"):
        stack_flow(torch.zeros(1, 2, 11, 4, 4))


@pytest.mark.parametrize("name", ["two_stream", "fused_two_stream"])
def test_streams_of_different_lengths_are_refused(name):
    model = build(name, num_classes=3, width=0.125)
    with pytest.raises(ValueError, match="'rgb': 2, 'flow': 1"):
        model({"rgb": torch.zeros(1, 3, 2, 32, 32), "flow": torch.zeros(1, 2, 10, 32, 32)})


@torch.no_grad()
def test_logits_are_the_sum_of_the_streams():
    both = build("two_stream", num_classes=3, width=0.125, size=32).eval()
    rgb = build("two_stream", num_classes=3, stream="rgb", width=0.125, size=32).eval()
    flow = build("two_stream", num_classes=3, stream="flow", width=0.125, size=32).eval()
    for one in (rgb, flow):
        one.load_state_dict({name: t for name, t in both.state_dict().items() if name in one.state_dict()})
    clips = {"rgb": torch.randn(1, 3, 1, 32, 32), "flow": torch.randn(1, 2, 10, 32, 32)}
    torch.testing.assert_close(both(clips), rgb(clips) + flow(clips["flow"]))


@torch.no_grad()
def test_snapshots_of_a_clip_are_averaged():
    model = build("two_stream", num_classes=3, width=0.125, size=32).eval()
    rgb, flow = torch.randn(1, 3, 2, 32, 32), torch.randn(1, 2, 20, 32, 32)
    halves = [model({"rgb": rgb[:, :, i : i + 1], "flow": flow[:, :, 10 * i : 10 * i + 10]}) for i in range(2)]
    torch.testing.assert_close(model({"rgb": rgb, "flow": flow}), (halves[0] + halves[1]) / 2)


def test_one_stream_asks_for_one_stream():
    assert set(build("two_stream", num_classes=3, stream="flow", width=0.125).input_spec.train.streams) == {"flow"}
    with pytest.raises(ValueError, match="None for both"):
        build("two_stream", num_classes=3, stream="depth")
