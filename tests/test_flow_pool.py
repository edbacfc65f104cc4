"""Batches of frames to actors on pretended GPUs and back, and actors that die on the way."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray._private.worker import global_worker
from test_tvl1 import texture

from pipelines import tvl1
from pipelines.errors import BackendError
from pipelines.extraction import flow_pool
from pipelines.extraction.batches import BATCH_PIXELS, MOST_PAIRS, iter_batches, pairs_of
from pipelines.extraction.flow_actor import FlowActor, FlowTask
from pipelines.extraction.flow_pool import FlowLostError, open_pool
from pipelines.media.codec import CodecSettings, quantise, stack_components
from pipelines.tvl1 import TVL1Params

SCALE = CodecSettings().flow_scale
TASK = FlowTask(backend="cpu", preset="fast", scale=SCALE)
FRAMES = np.stack([texture(24, 32, seed) for seed in range(8)])
BRIEF = TVL1Params(num_scales=1, num_warps=1, num_iterations=1)  # what Triton's interpreter can do in no time


@pytest.fixture(scope="module")
def ray_cluster(ray_here: None) -> str:
    """The folder of Ray's logs."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    return global_worker.node.get_logs_dir_path()


def expected_levels() -> np.ndarray:
    return stack_components(quantise(tvl1.flow(FRAMES, preset="fast", backend="cpu"), SCALE))


def test_batches_overlap_by_a_frame_and_lose_none() -> None:
    frames = [np.full((2, 3), index, np.uint8) for index in range(6)]
    batches = [[int(frame[0, 0]) for frame in batch] for batch in iter_batches(frames, 12)]
    assert batches == [[0, 1, 2], [2, 3, 4], [4, 5]]
    assert list(iter_batches(frames[:1], 12)) == []
    assert [len(batch) for batch in iter_batches(frames[:5], 12)] == [3, 3]


def test_a_batch_is_bounded_in_bytes_whatever_the_size_of_a_frame() -> None:
    assert pairs_of(340 * 256, BATCH_PIXELS) == 64
    assert pairs_of(3840 * 2160, BATCH_PIXELS) == 1
    assert pairs_of(16 * 16, BATCH_PIXELS) == MOST_PAIRS


def test_codes_counts_and_sample_come_back_in_order(ray_cluster: str) -> None:
    with open_pool(TASK, num_actors=1, gpus_per_actor=1) as pool:
        pool.batch_pixels = 2 * 24 * 32
        batches = list(pool.stream(iter(FRAMES), 3))
        assert pool.kernel() == tvl1.kernel_target("cpu")
        assert pool.busy_seconds()[0] > 0
    assert [len(batch.levels) for batch in batches] == [2, 2, 2, 1]
    assert [len(batch.sample) for batch in batches] == [2, 1, 0, 0]
    assert np.array_equal(np.concatenate([batch.levels for batch in batches]), expected_levels())


class OtherActor(FlowActor):
    """An actor on another kind of GPU than the planned one, if it is the first."""

    mark = ""

    def __init__(self, task: FlowTask) -> None:
        super().__init__(task)
        try:
            Path(self.mark).touch(exist_ok=False)
            self.kernel = "of another kind"
        except FileExistsError:
            pass


@pytest.mark.parametrize("planned", [tvl1.kernel_target("cpu"), "of a third kind"], ids=["there", "not there"])
def test_of_gpus_of_two_kinds_those_of_one_compute(
    ray_cluster: str, tmp_path: Path, monkeypatch: Any, planned: str
) -> None:
    monkeypatch.setattr(OtherActor, "mark", str(tmp_path / "first"))
    monkeypatch.setattr(flow_pool, "FlowActor", OtherActor)
    with open_pool(TASK, num_actors=2, gpus_per_actor=0.5) as pool:
        kernel = pool.kernel(planned)
        pool.batch_pixels = 24 * 32
        batches = list(pool.stream(iter(FRAMES), 0))
    assert {batch.kernel for batch in batches} == {kernel}
    assert kernel == planned or planned == "of a third kind"


class CountingFrames:
    """Frames that count how many were asked for."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        for frame in np.concatenate([FRAMES] * 4):
            self.taken += 1
            yield frame


def test_of_a_long_video_few_batches_are_on_their_way(ray_cluster: str) -> None:
    frames = CountingFrames()
    with open_pool(TASK, num_actors=1, gpus_per_actor=1) as pool:
        pool.batch_pixels = 24 * 32
        stream = pool.stream(frames, 0)
        next(stream)
        assert frames.taken == flow_pool.IN_FLIGHT + 2
        assert len(list(stream)) == 30


class MortalActor(FlowActor):
    """An actor that kills itself in its second batch: the first time, or every time."""

    mark = ""
    once = True

    def solve(self, frames: Any, num_samples: int) -> Any:
        if frames[0, 0, 0] == FRAMES[2, 0, 0] and not (self.once and Path(self.mark).exists()):
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().solve(frames, num_samples)


def test_an_actor_that_dies_comes_back_and_no_batch_is_lost(ray_cluster: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(MortalActor, "mark", str(tmp_path / "died"))
    monkeypatch.setattr(flow_pool, "FlowActor", MortalActor)
    with open_pool(TASK, num_actors=1, gpus_per_actor=1) as pool:
        pool.batch_pixels = 2 * 24 * 32
        levels = np.concatenate([batch.levels for batch in pool.stream(iter(FRAMES), 0)])
    assert Path(MortalActor.mark).exists()
    assert np.array_equal(levels, expected_levels())
    logs = "".join(path.read_text(errors="replace") for path in Path(ray_cluster).iterdir() if path.is_file())
    own = [line for line in logs.splitlines() if "MortalActor" in line]
    assert own
    assert not any("has constructor arguments in the object store" in line for line in own)


def test_a_batch_that_always_kills_its_actor_ends_the_run(ray_cluster: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(MortalActor, "mark", str(tmp_path / "died"))
    monkeypatch.setattr(MortalActor, "once", False)
    monkeypatch.setattr(flow_pool, "FlowActor", MortalActor)
    monkeypatch.setattr(flow_pool, "MAX_DEATHS", 1)
    with open_pool(TASK, num_actors=1, gpus_per_actor=1) as pool:
        pool.batch_pixels = 2 * 24 * 32
        with pytest.raises(FlowLostError, match="died"):
            list(pool.stream(iter(FRAMES), 0))


class FailingActor(FlowActor):
    def solve(self, frames: Any, num_samples: int) -> Any:
        raise ValueError("flow holds NaN")


def test_what_a_solve_raises_arrives_as_itself(ray_cluster: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(flow_pool, "FlowActor", FailingActor)
    with open_pool(TASK, num_actors=1, gpus_per_actor=1) as pool, pytest.raises(ValueError, match="NaN") as caught:
        list(pool.stream(iter(FRAMES), 0))
    assert type(caught.value) is ValueError


class BriefActor(FlowActor):
    """An actor whose kernels do little."""

    def __init__(self, task: FlowTask) -> None:
        tvl1.preset_params = lambda preset: BRIEF
        super().__init__(task)


def test_the_kernels_run_in_an_actor(ray_cluster: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(flow_pool, "FlowActor", BriefActor)
    task = FlowTask(backend="torch", preset="brief", scale=SCALE)
    with open_pool(task, num_actors=1, gpus_per_actor=1) as pool:
        (batch,) = pool.stream(iter(FRAMES[:3]), 1)
        assert pool.kernel() == tvl1.kernel_target("torch") == batch.kernel
    flow = tvl1.flow(FRAMES[:3], params=BRIEF, backend="torch")
    assert np.array_equal(batch.levels, stack_components(quantise(flow, SCALE)))
    assert np.array_equal(batch.sample, flow[:1])


class StillbornActor(FlowActor):
    def __init__(self, task: FlowTask) -> None:
        raise BackendError("torch sees no GPU")


def test_an_actor_that_cannot_start_says_why(ray_cluster: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(flow_pool, "FlowActor", StillbornActor)
    with (
        open_pool(TASK, num_actors=1, gpus_per_actor=1) as pool,
        pytest.raises(BackendError, match="torch sees no GPU"),
    ):
        pool.kernel()
