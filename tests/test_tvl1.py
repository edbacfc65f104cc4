"""TV-L1 flow: the compiled CPU backend against the oracle, against flow that is known, and at the edges."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from tvl1_oracle import bicubic, oracle_flow

from pipelines import tvl1
from pipelines.errors import BackendError
from pipelines.tvl1 import PRESETS, TVL1Params

ROOT = Path(__file__).resolve().parents[1]
FIXED = TVL1Params(freeze_below=0, drop_below=0)


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth random grey levels (H, W), uint8, with detail at several scales."""
    y, x = np.mgrid[:height, :width]
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width))
    for period in (9, 14, 23, 40, 70):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        image += np.sin((np.cos(angle) * x + np.sin(angle) * y) * 2 * np.pi / period + phase)
        image += np.sin((np.sin(angle) * x - np.cos(angle) * y) * 2 * np.pi / period + 2 * phase)
    return np.clip(128 + 20 * image, 0, 255).astype(np.uint8)


def pair_with_flow(kind: str, height: int = 96, width: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """Frames (2, H, W) and the flow (H, W, 2) that leads from the first to the second."""
    second = texture(height, width)
    y, x = np.mgrid[:height, :width].astype(float)
    cx, cy = x - width / 2, y - height / 2
    u, v = {
        "translation": (np.full_like(x, 2.3), np.full_like(x, -1.6)),
        "rotation": (-0.03 * cy, 0.03 * cx),
        "zoom": (0.03 * cx, 0.03 * cy),
    }[kind]
    first = np.clip(np.round(bicubic(second.astype(float), x + u, y + v)), 0, 255).astype(np.uint8)
    return np.stack([first, second]), np.stack([u, v], -1)


def errors(flow: np.ndarray, truth: np.ndarray, border: int = 8) -> np.ndarray:
    inner = np.hypot(*np.moveaxis(flow - truth, -1, 0))
    return inner[border:-border, border:-border]


@pytest.mark.parametrize("size", [(64, 80), (61, 47), (40, 300), (33, 530), (17, 256), (2, 3), (1, 40), (1, 1)])
def test_cpu_follows_the_oracle(size: tuple[int, int]) -> None:
    frames = np.stack([texture(*size), np.roll(texture(*size), 1, axis=1)])
    error = np.abs(tvl1.flow(frames, params=FIXED, backend="cpu")[0] - oracle_flow(*frames, FIXED))
    assert error.mean() < 2e-4
    # In float64 the oracle's own worst pixel of the first size moves by 6e-3 where lambda changes in its sixth digit.
    assert error.max() < 2e-2


def test_cpu_follows_the_oracle_without_median_and_with_another_schedule() -> None:
    params = dataclasses.replace(FIXED, median=1, theta=0.2, num_warps=2, num_scales=3, scale_step=0.5)
    frames, _ = pair_with_flow("rotation")
    flow = tvl1.flow(frames, params=params, backend="cpu")[0]
    assert np.abs(flow - oracle_flow(*frames, params)).max() < 5e-3


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("kind", ["translation", "rotation", "zoom"])
def test_known_flow_is_found(preset: str, kind: str) -> None:
    frames, truth = pair_with_flow(kind)
    flow = tvl1.flow(frames, preset=preset, backend="cpu")[0]
    assert errors(flow, truth).mean() < 0.1


def test_early_stop_changes_little_where_things_move() -> None:
    frames, truth = pair_with_flow("zoom", 128, 160)
    with_stop = errors(tvl1.flow(frames, backend="cpu")[0], truth).mean()
    fixed = errors(tvl1.flow(frames, params=FIXED, backend="cpu")[0], truth).mean()
    assert with_stop < fixed + 0.01


@pytest.mark.parametrize("backend", ["cpu", "opencv"])
@pytest.mark.parametrize("axis", [0, 1])
def test_mirrored_frames_give_mirrored_flow(backend: str, axis: int) -> None:
    frames, _ = pair_with_flow("rotation")
    flow = tvl1.flow(frames, backend=backend)[0]
    mirrored = np.flip(tvl1.flow(np.flip(frames, axis + 1), backend=backend)[0], axis).copy()
    mirrored[..., 1 - axis] *= -1
    assert errors(flow, mirrored).mean() < 0.05


def test_reversed_pair_gives_the_opposite_flow() -> None:
    frames, truth = pair_with_flow("translation")
    backward = tvl1.flow(frames[::-1], backend="cpu")[0]
    assert errors(backward, -truth).mean() < 0.1


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (15, 16), (16, 15), (31, 33), (257, 259), (64, 513)])
def test_any_size_gives_finite_flow(shape: tuple[int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, *shape), dtype=np.uint8)
    flow = tvl1.flow(frames, backend="cpu")
    assert flow.shape == (2, *shape, 2)
    assert flow.dtype == np.float32
    assert np.isfinite(flow).all()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1080, 1920), pytest.param((2160, 3840), marks=pytest.mark.soak)])
def test_large_frames_give_finite_flow(size: tuple[int, int]) -> None:
    frames = np.stack([texture(*size), np.roll(texture(*size), 2, 1)])
    flow = tvl1.flow(frames, preset="fast", backend="cpu")[0]
    assert np.isfinite(flow).all()
    assert abs(np.median(flow[..., 0]) - 2) < 0.1


@pytest.mark.parametrize("level", [0, 128, 255])
def test_constant_frames_have_no_flow(level: int) -> None:
    assert not tvl1.flow(np.full((3, 50, 70), level, np.uint8), backend="cpu").any()


def test_a_repeated_frame_has_no_flow() -> None:
    assert np.abs(tvl1.flow(np.stack([texture(50, 70)] * 2), backend="cpu")).max() < 1e-3


@pytest.mark.parametrize("num_frames", [0, 1])
def test_no_pair_gives_empty_flow(num_frames: int) -> None:
    flow = tvl1.flow(np.zeros((num_frames, 20, 30), np.uint8), backend="cpu")
    assert flow.shape == (0, 20, 30, 2)
    assert flow.dtype == np.float32


def test_views_with_any_strides_are_accepted() -> None:
    wide = np.random.default_rng(0).integers(0, 256, (4, 60, 80), dtype=np.uint8)
    view = wide[::2, ::-1, ::2]
    assert np.array_equal(tvl1.flow(view, backend="cpu"), tvl1.flow(view.copy(), backend="cpu"))


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 9, 9)), np.zeros((9, 9), np.uint8), np.zeros((2, 9, 9, 3), np.uint8), [[[0]]]]
)
def test_other_input_is_refused_with_its_shape_and_dtype(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"pass a uint8 array of shape \(T, H, W\)"):
        tvl1.flow(frames)


def test_empty_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="not empty"):
        tvl1.flow(np.zeros((2, 0, 5), np.uint8), backend="cpu")


def test_a_stream_that_changes_size_is_refused() -> None:
    frames = [np.zeros((20, 30), np.uint8), np.zeros((20, 31), np.uint8)]
    with pytest.raises(ValueError, match=r"\(20, 31\) after \(20, 30\)"):
        list(tvl1.iter_flow(frames, backend="cpu"))


def test_unknown_names_are_refused_before_any_frame_is_read() -> None:
    with pytest.raises(ValueError, match="faithful, quality, fast"):
        tvl1.iter_flow(iter([]), preset="best")
    with pytest.raises(ValueError, match="auto, cpu, torch, opencv"):
        tvl1.resolve_backend("gpu")


@pytest.mark.parametrize(
    ("name", "value"), [("tau", 0.3), ("theta", 0), ("num_scales", 0), ("scale_step", 1.0), ("median", 5)]
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        TVL1Params(**{name: value})  # type: ignore[arg-type]


def test_streaming_equals_the_whole_video() -> None:
    frames = np.stack([texture(40, 300, seed) for seed in range(5)])
    streamed = np.stack(list(tvl1.iter_flow(iter(frames), backend="cpu")))
    assert np.array_equal(streamed, tvl1.flow(frames, backend="cpu"))


def test_every_pair_is_independent_of_what_came_before() -> None:
    frames = np.stack([texture(50, 300, seed) for seed in range(4)])
    alone = [tvl1.flow(frames[t : t + 2], backend="cpu")[0] for t in range(3)]
    assert np.array_equal(np.stack(alone), tvl1.flow(frames, backend="cpu"))


def test_threads_give_the_same_bits() -> None:
    frames = np.stack([texture(120, 150, seed) for seed in range(3)])
    expected = tvl1.flow(frames, backend="cpu")
    found: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: found.append(tvl1.flow(frames, backend="cpu"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(np.array_equal(flow, expected) for flow in found)


def test_another_process_gives_the_same_bits() -> None:
    code = (
        "import hashlib, numpy as np; from pipelines import tvl1; "
        "frames = np.random.default_rng(5).integers(0, 256, (3, 90, 300), dtype=np.uint8); "
        "print(hashlib.sha256(tvl1.flow(frames, backend='cpu').tobytes()).hexdigest())"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    frames = np.random.default_rng(5).integers(0, 256, (3, 90, 300), dtype=np.uint8)
    assert out.stdout.strip() == hashlib.sha256(tvl1.flow(frames, backend="cpu").tobytes()).hexdigest()


def test_a_long_video_costs_memory_for_two_frames() -> None:
    def endless() -> Iterator[np.ndarray]:
        while True:
            yield np.zeros((128, 160), np.uint8)

    flows = tvl1.iter_flow(endless(), backend="cpu")
    next(flows)
    tracemalloc.start()
    for _ in islice(flows, 50):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 128 * 160 * 8 + 100_000


def test_importing_the_front_door_loads_no_framework() -> None:
    code = "import sys, pipelines.tvl1; print([m for m in ('numba', 'torch', 'cv2', 'triton') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_another_process_finds_the_compiled_kernels() -> None:
    tvl1.prewarm("cpu")
    code = (
        "from pipelines import tvl1; tvl1.prewarm('cpu'); from pipelines.tvl1.cpu import kernels; "
        "stats = kernels.solve_scale.stats; print(len(stats.cache_misses), len(stats.cache_hits))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["0", "1"]


@pytest.mark.soak
def test_workers_that_start_together_on_a_new_node_load_the_same_machine_code(tmp_path: Path) -> None:
    code = (
        "import hashlib, numpy as np; from pipelines import tvl1; "
        "frames = np.random.default_rng(5).integers(0, 256, (3, 90, 300), dtype=np.uint8); "
        "bits = hashlib.sha256(tvl1.flow(frames, backend='cpu').tobytes()).hexdigest(); "
        "from pipelines.tvl1.cpu import kernels; "
        "print(bits, kernels.__file__, len(kernels.solve_scale.stats.cache_misses))"
    )
    home = {**os.environ, "HOME": "/dev/null", "TMPDIR": str(tmp_path)}
    start = partial(subprocess.Popen, cwd=ROOT, env=home, stdout=subprocess.PIPE, text=True)
    outputs = [worker.communicate()[0].split() for worker in [start([sys.executable, "-c", code]) for _ in range(2)]]
    assert len({bits for bits, _, _ in outputs}) == 1
    assert all(path.startswith(str(tmp_path)) and misses == "0" for _, path, misses in outputs)


def test_opencv_faithful_is_opencv_with_nothing_set() -> None:
    cv2 = pytest.importorskip("cv2")
    frames, _ = pair_with_flow("zoom")
    expected = cv2.optflow.DualTVL1OpticalFlow_create().calc(frames[0], frames[1], None)
    assert np.array_equal(tvl1.flow(frames, backend="opencv")[0], expected)


def test_kernel_target_names_the_processor_family() -> None:
    assert tvl1.kernel_target("cpu").startswith("cpu numba-")
    assert tvl1.kernel_target("opencv").startswith("opencv ")


@pytest.mark.slow
def test_middlebury_error_is_no_worse_than_opencvs(shared_data: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    folder = shared_data / "flow" / "RubberWhale"
    frames = np.stack([cv2.imread(str(folder / name), cv2.IMREAD_GRAYSCALE) for name in ("frame10.png", "frame11.png")])
    truth = np.frombuffer((folder / "flow10.flo").read_bytes(), "<f4", offset=12).reshape(*frames.shape[1:], 2)
    known = np.abs(truth).max(-1) < 1e9
    ours, theirs = (
        np.hypot(*(tvl1.flow(frames, backend=backend)[0] - truth)[known].T).mean() for backend in ("cpu", "opencv")
    )
    assert ours < 1.05 * theirs


def test_opencv_without_tvl1_says_which_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = pytest.importorskip("cv2")
    monkeypatch.delattr(cv2, "optflow")
    with pytest.raises(BackendError, match="opencv-contrib-python-headless"):
        tvl1.kernel_target("opencv")
