"""The torch backend and its Triton kernel against the NumPy oracle and against the CPU backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_tvl1 import pair_with_flow, texture
from tvl1_oracle import oracle_flow

from pipelines import tvl1
from pipelines.tvl1 import TVL1Params

ROOT = Path(__file__).resolve().parents[1]
FIXED = TVL1Params(freeze_below=0, drop_below=0)

AGAINST_EAGER = """
import torch
from pipelines.tvl1.torch_backend import iterate_once
from pipelines.tvl1.triton_kernel import iterate_fused

torch.manual_seed(0)
for size in ((1, 1), (1, 9), (7, 1), (13, 29), (40, 33)):
    state, data = torch.randn(2, 6, *size) * 0.3, torch.randn(2, 4, *size)
    state[:, 2::2, :, -1], state[:, 3::2, -1] = 0, 0
    data[:, 3] = 1 / (data[:, :2] ** 2).sum(1)
    steps = (0.3, 0.045, 0.25 / 0.3)
    expected = state
    for _ in range(3):
        expected = iterate_once(expected, data, *steps)
    fused = iterate_fused(state.clone(), data, steps, 3)
    print(float((fused - expected).abs().max()))
"""

WHOLE_FLOW = """
import sys
import numpy as np
import torch
from pipelines.tvl1 import TVL1Params, torch_backend
from pipelines.tvl1.triton_kernel import iterate_fused

torch_backend.iterate = lambda state, data, p: iterate_fused(
    state, data, (p.theta, p.lambda_ * p.theta, p.tau / p.theta), p.num_iterations
)
frames = torch.from_numpy(np.load(sys.argv[1]))
params = TVL1Params(num_scales=3, num_warps=2, num_iterations=4, freeze_below=0, drop_below=0)
np.save(sys.argv[2], torch_backend.solve(frames[:-1], frames[1:], params).numpy())
"""


def run_interpreted(code: str, *arguments: str) -> str:
    """Run code with Triton's interpreter, which is chosen when triton is first imported."""
    pytest.importorskip("triton")
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return out.stdout


@pytest.mark.parametrize("size", [(64, 80), (61, 47), (17, 60), (1, 40), (1, 1)])
def test_torch_follows_the_oracle(size: tuple[int, int]) -> None:
    frames = np.stack([texture(*size), np.roll(texture(*size), 1, axis=1)])
    difference = np.abs(tvl1.flow(frames, params=FIXED, backend="torch")[0] - oracle_flow(*frames, FIXED))
    assert difference.mean() < 1e-3
    assert difference.max() < 0.05


def test_torch_and_cpu_agree_without_early_stop() -> None:
    frames, _ = pair_with_flow("rotation")
    on_cpu, on_torch = (tvl1.flow(frames, params=FIXED, backend=backend) for backend in ("cpu", "torch"))
    assert np.abs(on_cpu - on_torch).mean() < 1e-3


def test_torch_and_cpu_agree_on_real_frames(shared_data: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    folder = shared_data / "flow" / "RubberWhale"
    frames = [
        cv2.imread(str(folder / name), cv2.IMREAD_GRAYSCALE)[:256, :340] for name in ("frame10.png", "frame11.png")
    ]
    on_cpu, on_torch = (tvl1.flow(np.stack(frames), backend=backend)[0] for backend in ("cpu", "torch"))
    fixed = tvl1.flow(np.stack(frames), params=FIXED, backend="cpu")[0]
    assert np.hypot(*(on_cpu - on_torch).T).mean() < 0.05
    assert np.hypot(*(fixed - on_torch).T).mean() < 1e-3


def test_batches_of_any_size_give_the_same_flow() -> None:
    frames = np.stack([texture(30, 40, seed) for seed in range(6)])
    whole = np.stack(list(tvl1.iter_flow(frames, backend="torch", batch_size=16)))
    assert whole.shape == (5, 30, 40, 2)
    for batch_size in (1, 2, 5):
        split = np.stack(list(tvl1.iter_flow(frames, backend="torch", batch_size=batch_size)))
        assert np.allclose(split, whole, atol=1e-4)


def test_a_batch_needs_a_pair() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        tvl1.iter_flow([], backend="torch", batch_size=0)


def test_the_fused_kernel_equals_the_plain_iteration() -> None:
    differences = [float(line) for line in run_interpreted(AGAINST_EAGER).split()]
    assert len(differences) == 5
    assert max(differences) < 1e-5


def test_flow_by_the_fused_kernel_follows_the_oracle(tmp_path: Path) -> None:
    frames = np.stack([texture(40, 50), np.roll(texture(40, 50), 1, axis=1)])
    np.save(tmp_path / "frames.npy", frames)
    run_interpreted(WHOLE_FLOW, str(tmp_path / "frames.npy"), str(tmp_path / "flow.npy"))
    params = TVL1Params(num_scales=3, num_warps=2, num_iterations=4, freeze_below=0, drop_below=0)
    assert np.abs(np.load(tmp_path / "flow.npy")[0] - oracle_flow(*frames, params)).max() < 5e-3


def test_auto_is_torch_only_with_cuda() -> None:
    import torch

    assert tvl1.resolve_backend("auto") == ("torch" if torch.cuda.is_available() else "cpu")
    assert tvl1.kernel_target("torch").startswith("torch ")
