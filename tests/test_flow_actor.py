"""What a flow actor makes of frames, on a GPU or, in Triton's interpreter, as if on one."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from test_tvl1 import texture

from pipelines import tvl1
from pipelines.extraction import flow_actor
from pipelines.extraction.flow_actor import DeviceFlow, FlowActor, FlowTask
from pipelines.media.codec import CodecSettings, count_levels, quantise, stack_components
from pipelines.tvl1 import TVL1Params

SCALE = CodecSettings().flow_scale
BRIEF = TVL1Params(num_scales=1, num_warps=1, num_iterations=1)


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> FlowTask:
    """TV-L1 that the interpreter can do in no time."""
    monkeypatch.setattr(tvl1, "preset_params", lambda preset: BRIEF)
    return FlowTask(backend="torch", preset="brief", scale=SCALE)


def texture_frames(count: int) -> np.ndarray:
    frames = np.stack([texture(8, 12, seed) for seed in range(count)])
    frames.flags.writeable = False  # as those are that come from Ray's object store
    return frames


def test_codes_counts_and_sample_are_those_of_the_flow(task: FlowTask) -> None:
    frames = texture_frames(4)
    flow = tvl1.flow(frames, params=BRIEF, backend="torch")
    levels, counts, sample = DeviceFlow(task).solve(frames, 2)
    assert levels.dtype == np.uint16
    assert np.array_equal(levels, stack_components(quantise(flow, SCALE)))
    assert np.array_equal(sample, flow[:2])
    for found, image in zip(counts, levels, strict=True):
        expected = count_levels(image, SCALE)
        assert found.clipped == expected.clipped
        assert found.length == pytest.approx(expected.length, rel=1e-5)


def test_a_full_gpu_solves_the_batch_in_parts(task: FlowTask, monkeypatch: Any) -> None:
    frames = texture_frames(4)
    expected = DeviceFlow(task).solve(frames, 2)
    cramped = DeviceFlow(task)
    solve = cramped.solver.solve

    def solve_one(part: torch.Tensor) -> torch.Tensor:
        if len(part) > 2:
            raise torch.OutOfMemoryError("no room")
        return solve(part)

    monkeypatch.setattr(cramped.solver, "solve", solve_one)
    found = cramped.solve(frames, 2)
    assert cramped.solver.most_pairs == {(8, 12): 1}
    assert np.array_equal(found[0], expected[0])
    assert found[1] == expected[1]
    assert np.array_equal(found[2], expected[2])


def test_threads_do_not_mix_their_batches(task: FlowTask) -> None:
    flow, frames = DeviceFlow(task), [texture_frames(3)[i : i + 2] for i in range(2)]
    expected = [flow.solve(pair, 0)[0] for pair in frames]
    found: dict[int, np.ndarray] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: flow.solve(frames[i], 0)[0]})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[i], expected[i]) for i in range(2))
    assert flow.busy > 0


def test_flow_that_is_not_finite_is_an_error(task: FlowTask, monkeypatch: Any) -> None:
    flow = DeviceFlow(task)
    monkeypatch.setattr(flow.solver, "solve", lambda frames: torch.full((1, 2, 8, 12), float("nan")))
    with pytest.raises(ValueError, match="NaN or infinity"):
        flow.solve(texture_frames(2), 0)


@pytest.mark.parametrize(("error", "dies"), [(torch.AcceleratorError, True), (torch.OutOfMemoryError, False)])
def test_an_actor_whose_gpu_has_failed_dies_and_one_without_room_does_not(
    monkeypatch: Any, error: type[Exception], dies: bool
) -> None:
    actor = FlowActor(FlowTask(backend="cpu", preset="fast", scale=SCALE))
    exits: list[int] = []

    def fail(*args: object) -> None:
        raise error.__new__(error)

    monkeypatch.setattr(actor.solver, "solve", fail)
    monkeypatch.setattr(flow_actor.os, "_exit", exits.append)
    with pytest.raises(error):
        actor.solve(texture_frames(2), 0)
    assert exits == ([1] if dies else [])


@pytest.mark.gpu
def test_batches_of_many_threads_are_those_of_one_on_a_gpu() -> None:
    flow = DeviceFlow(FlowTask(backend="torch", preset="fast", scale=SCALE))
    clips = [np.stack([texture(120, 160, 9 * clip + seed) for seed in range(9)]) for clip in range(6)]
    expected = [flow.solve(clip, 0)[0] for clip in clips]
    found: dict[int, np.ndarray] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: flow.solve(clips[i], 0)[0]})) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[i], expected[i]) for i in range(6))
