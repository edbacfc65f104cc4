"""The torch backend, on a GPU or in Triton's interpreter, and its plain oracle against the CPU backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvl1_plain as plain
from test_tvl1 import pair_with_flow, texture
from tvl1_oracle import oracle_flow

from pipelines import tvl1
from pipelines.errors import BackendError
from pipelines.tvl1 import TVL1Params, torch_backend
from pipelines.tvl1.torch_backend import BatchSolver, floats_needed, launch_size, launches_of

FIXED = TVL1Params(freeze_below=0, drop_below=0)
BRIEF = TVL1Params(num_scales=2, num_warps=2, num_iterations=6, freeze_below=0, drop_below=0)  # two launches a warp


def plain_flow(frames: np.ndarray, params: TVL1Params) -> np.ndarray:
    stack = torch.from_numpy(frames)
    return plain.solve(stack[:-1], stack[1:], params).numpy()


def real_frames(shared_data: Path, rows: slice, columns: slice) -> np.ndarray:
    cv2 = pytest.importorskip("cv2")
    folder = shared_data / "flow" / "RubberWhale"
    names = ("frame10.png", "frame11.png")
    return np.stack([cv2.imread(str(folder / name), cv2.IMREAD_GRAYSCALE)[rows, columns] for name in names])


@pytest.mark.parametrize("size", [(64, 80), (61, 47), (17, 60), (1, 40), (1, 1)])
def test_plain_torch_follows_the_oracle(size: tuple[int, int]) -> None:
    frames = np.stack([texture(*size), np.roll(texture(*size), 1, axis=1)])
    difference = np.abs(plain_flow(frames, FIXED)[0] - oracle_flow(*frames, FIXED))
    assert difference.mean() < 1e-3
    assert difference.max() < 0.05


def test_plain_torch_and_cpu_agree_without_early_stop() -> None:
    frames, _ = pair_with_flow("rotation")
    assert np.abs(tvl1.flow(frames, params=FIXED, backend="cpu") - plain_flow(frames, FIXED)).mean() < 1e-3


def test_plain_torch_and_cpu_agree_on_real_frames(shared_data: Path) -> None:
    frames = real_frames(shared_data, slice(128), slice(170))
    whole = plain_flow(frames, FIXED)[0]
    stopping, fixed = (tvl1.flow(frames, params=params, backend="cpu")[0] for params in (TVL1Params(), FIXED))
    assert np.hypot(*(stopping - whole).T).mean() < 0.05
    assert np.hypot(*(fixed - whole).T).mean() < 1e-3


def test_the_kernels_follow_cpu_and_oracle_on_real_frames(shared_data: Path) -> None:
    frames = real_frames(shared_data, slice(100, 120), slice(200, 233))
    on_torch, on_cpu = (tvl1.flow(frames, params=BRIEF, backend=backend)[0] for backend in ("torch", "cpu"))
    assert np.hypot(*(on_cpu - on_torch).T).mean() < 1e-3
    assert np.abs(on_torch - oracle_flow(*frames, BRIEF)).max() < 5e-3
    assert np.abs(on_torch - plain_flow(frames, BRIEF)[0]).max() < 5e-3


@pytest.mark.parametrize(("size", "median"), [((1, 1), 3), ((9, 21), 1)])
def test_the_kernels_follow_the_oracle_on_odd_frames(size: tuple[int, int], median: int) -> None:
    params = TVL1Params(num_scales=2, min_size=4, num_warps=1, num_iterations=2, median=median)
    frames = np.stack([texture(*size), np.roll(texture(*size), 1, axis=1)])
    assert np.abs(tvl1.flow(frames, params=params, backend="torch")[0] - oracle_flow(*frames, params)).max() < 5e-3


def test_the_flow_of_a_pair_does_not_depend_on_the_batch() -> None:
    params = TVL1Params(num_scales=1, num_warps=1, num_iterations=2)
    frames = np.stack([texture(9, 20, seed) for seed in range(4)])
    whole, twos = (np.stack(list(tvl1.iter_flow(frames, params=params, backend="torch", batch_size=n))) for n in (3, 2))
    assert whole.shape == (3, 9, 20, 2)
    assert np.array_equal(whole, twos)  # of 4 and of 2 and 1 pairs


def test_a_batch_needs_a_pair() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        tvl1.iter_flow([], backend="torch", batch_size=0)


def test_batches_are_of_few_lengths_and_launches_as_long_as_may_be() -> None:
    assert [launch_size(pairs) for pairs in (1, 3, 8, 9, 64)] == [1, 4, 8, 16, 64]
    assert launches_of(25) == [5] * 5
    assert launches_of(12) == [5, 5, 2]


def test_a_workspace_holds_what_a_solve_needs_and_no_more() -> None:
    for batch, size in ((1, (1, 1)), (3, (37, 50)), (16, (256, 340))):
        workspace = torch.zeros(floats_needed(batch, size, FIXED))
        schedule = torch_backend.Schedule(batch, size, FIXED, torch_backend.INTERPRETED, workspace, graphs=False)
        assert 0 <= len(schedule.memory) - sum(part.numel() for part in schedule._parts()) < 32


def test_of_many_sizes_the_last_are_kept_ready(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch_backend, "MOST_SCHEDULES", 2)
    solver = BatchSolver(FIXED)
    for height in (9, 8, 9, 7):
        solver._schedule(1, (height, 9))
    assert list(solver.schedules) == [(1, (9, 9)), (1, (7, 9))]
    assert len(solver.workspace) == floats_needed(1, (9, 9), FIXED)
    solver._schedule(2, (9, 9))  # does not fit the memory that the others are views of
    assert list(solver.schedules) == [(2, (9, 9))]


class CrampedSolver(BatchSolver):
    """A solver on a GPU that has room for two pairs; its flow says which frames it is of."""

    def __init__(self) -> None:
        super().__init__(FIXED)
        self.asked: list[int] = []
        self.room = 2

    def solve(self, frames: torch.Tensor) -> torch.Tensor:
        self.asked.append(len(frames) - 1)
        if len(frames) - 1 > self.room:
            raise torch.OutOfMemoryError("no room")
        return frames[:-1]


def test_a_full_gpu_gets_smaller_batches_and_keeps_to_them() -> None:
    solver, frames = CrampedSolver(), torch.arange(8, dtype=torch.uint8).reshape(8, 1, 1)
    for _ in range(2):
        parts = list(solver.solve_in_parts(frames, 7, lambda flow: flow.flatten().tolist()))
        assert [index for part in parts for index in part] == list(range(7))
    assert solver.asked == [7, 3, 1, 1, 1, 1, 1, 1, 1] + [1] * 7
    assert list(solver.solve_in_parts(torch.zeros(3, 2, 2), 7, len)) == [2]  # another size has its own limit


def test_a_gpu_without_room_for_one_pair_says_so() -> None:
    solver = CrampedSolver()
    solver.room = 0
    with pytest.raises(torch.OutOfMemoryError):
        list(solver.solve_in_parts(torch.zeros(4, 2, 2), 7, len))


@pytest.mark.skipif(torch.cuda.is_available(), reason="its workspace is not on the GPU")
def test_a_solve_that_cannot_be_recorded_is_launched(monkeypatch: Any, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", fail)
    params = TVL1Params(num_scales=1, num_warps=1, num_iterations=1)
    workspace = torch.zeros(floats_needed(1, (4, 5), params))
    schedule = torch_backend.Schedule(1, (4, 5), params, torch_backend.INTERPRETED, workspace, graphs=True)
    schedule.frames[:] = torch.arange(40, dtype=torch.uint8).reshape(2, 4, 5)
    flows = [schedule.run().clone() for _ in range(3)]
    assert all(torch.equal(flow, flows[0]) for flow in flows)
    assert caplog.text.count("no graphs here") == 1


def test_without_a_gpu_the_backend_says_what_to_do(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch_backend.triton.knobs.runtime, "interpret", False)
    with pytest.raises(BackendError, match="take backend cpu"):
        tvl1.kernel_target("torch")


def test_auto_is_torch_only_with_cuda() -> None:
    assert tvl1.resolve_backend("auto") == ("torch" if torch.cuda.is_available() else "cpu")
    assert tvl1.kernel_target("torch").startswith("torch ")


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["faithful", "quality", "fast"])
def test_whole_solves_on_a_gpu_agree_with_the_cpu(shared_data: Path, preset: str) -> None:
    frames = real_frames(shared_data, slice(256), slice(340))
    on_gpu, on_cpu = (tvl1.flow(frames, preset=preset, backend=backend)[0] for backend in ("torch", "cpu"))
    assert np.hypot(*(on_cpu - on_gpu).T).mean() < 0.05


@pytest.mark.gpu
def test_a_recorded_solve_is_the_same_bits() -> None:
    frames = torch.from_numpy(np.stack([texture(120, 160, seed) for seed in range(17)])).cuda()
    plainly, recorded = BatchSolver(FIXED, graphs=False), BatchSolver(FIXED)
    expected = plainly.solve(frames).clone()
    found = [recorded.solve(frames).clone() for _ in range(3)]  # run, recorded, replayed
    assert next(iter(recorded.schedules.values())).graph is not None
    assert all(torch.equal(flow, expected) for flow in found)
    assert torch.equal(recorded.solve(frames[3:5]), expected[3:4])
