"""The GPU benchmark of the networks compares the same computations, and says what it could not measure."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu_networks
from gpu_networks import PORT, Row, Settings, make_clips, make_i3d, make_port, measure, per_clip, ratios

from models import cuda

SMALL = Settings(batch=2, frames=16, size=32, rounds=1, small=True)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@torch.no_grad()
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_port_is_the_same_network(channels_last: bool) -> None:
    model = make_i3d(SMALL).eval()
    port = make_port(copy.deepcopy(model), SMALL, channels_last=channels_last).eval()
    clips = make_clips(model, SMALL, 2)
    torch.testing.assert_close(port(clips), model(clips), atol=1e-5, rtol=1e-4)


def test_every_way_to_compute_conv1_is_the_same() -> None:
    clip, weight = torch.randn(1, 3, 8, 12, 10), torch.randn(4, 3, 7, 7, 7)
    expected = nn.functional.conv3d(gpu_networks._padded(clip, (7, 7, 7), (2, 2, 2)), weight, None, (2, 2, 2))
    for found in (
        gpu_networks._convolve_padded(clip, weight),
        gpu_networks._convolve_windows(clip, weight),
        cuda.convolve_clip(clip, weight, None, (2, 2, 2)),
    ):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_a_variant_that_fails_stops_no_other() -> None:
    rows = measure("training", {"bad": lambda: 1 / 0, "good": lambda: lambda: None}, SMALL)  # type: ignore[dict-item,return-value]
    assert [row.error for row in rows] == ["ZeroDivisionError: division by zero", ""]
    assert rows[1].milliseconds is not None


def test_ratios_are_of_clips_a_second() -> None:
    rows = [
        Row(part="training", name=PORT, milliseconds=200.0),
        Row(part="training", name="ours, bf16", milliseconds=80.0),
    ]
    speeds = per_clip(rows, 16, 1e9)
    assert [row.clips_per_s for row in speeds] == [80.0, 200.0]
    assert ratios(speeds) == {"train_clips_per_s": 200.0, "train_over_port": 2.5}
