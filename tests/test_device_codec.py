"""Quantising in torch against the codec's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.media.codec import CodecSettings, FlowCodec, count_levels, quantise, stack_components
from pipelines.media.device_codec import FIXED_POINT, quantise_planes

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def flow_with_ties(bound: float, step: float, zero_code: float) -> np.ndarray:
    """(3, 20, 30, 2): flow on, between and right beside all codes, beyond the bounds, and random."""
    codes = np.arange(1300) / 2 - 325 - zero_code % 1
    exact = (codes * step).astype(np.float32)
    exact = np.concatenate([exact, np.nextafter(exact, np.float32(9e9))])
    rng = np.random.default_rng(0)
    rest = rng.uniform(-1.2 * bound, 1.2 * bound, 3 * 20 * 30 * 2 - len(exact)).astype(np.float32)
    return np.concatenate([exact, rest]).reshape(3, 20, 30, 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codec", ["h264", "lossless", "jpeg"])
@pytest.mark.parametrize("bound", [20.0, 8.0, 0.3, 15.7])
def test_codes_and_counts_are_those_of_the_codec(device: str, codec: FlowCodec, bound: float) -> None:
    scale = CodecSettings(flow_codec=codec, bound=bound).flow_scale
    flow = flow_with_ties(bound, scale.step, scale.zero_code)
    found = quantise_planes(torch.from_numpy(flow).permute(0, 3, 1, 2).contiguous().to(device), scale)
    codes = found.codes.cpu().numpy().view(scale.dtype)
    assert np.array_equal(codes, stack_components(quantise(flow, scale)))
    for i, counts in enumerate(count_levels(image, scale) for image in codes):
        assert int(found.clipped[i]) == counts.clipped
        assert int(found.lengths[i]) / FIXED_POINT == pytest.approx(counts.length, rel=1e-5)
    assert bool(found.finite)


def test_counts_of_a_pair_do_not_depend_on_the_batch() -> None:
    scale = CodecSettings().flow_scale
    flow = torch.randn(5, 2, 61, 47) * 9
    whole = quantise_planes(flow, scale)
    alone = [quantise_planes(flow[i : i + 1], scale) for i in range(5)]
    assert torch.equal(whole.lengths, torch.cat([one.lengths for one in alone]))


def test_flow_that_is_not_finite_is_noticed() -> None:
    flow = torch.zeros(2, 2, 4, 4)
    flow[1, 0, 2, 2] = float("nan")
    assert not bool(quantise_planes(flow, CodecSettings().flow_scale).finite)
