"""The self-made videos: real files, equal bytes for equal seeds, classes that only motion tells apart."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import av
import cv2
import numpy as np
import numpy.typing as npt
import pytest

from pipelines.datasets.catalog import read_catalog
from pipelines.datasets.motion_videos import (
    CLASSES,
    Scene,
    draw_scene,
    render_frame,
    write_broken_videos,
    write_motion_videos,
)

SIZE = (64, 48)
Floats = npt.NDArray[np.float64]


def _scene(label: int, index: int, size: tuple[int, int]) -> Scene:
    return draw_scene(np.random.default_rng([label, index]), size)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.mp4"))}


def test_files_are_h264_in_split_and_class_folders(tmp_path: Path) -> None:
    write_motion_videos(tmp_path, videos_per_class=3, seed=0, num_frames=12, size=(64, 48))
    catalog = read_catalog(str(tmp_path))
    assert catalog.classes == CLASSES
    assert [row["expected"] for row in catalog.counts().to_pylist()] == [1] * 6 + [2] * 6  # test, train
    for path in catalog.table["path"].to_pylist():
        with av.open(path) as container:
            stream = container.streams.video[0]
            shown = (stream.codec_context.name, stream.average_rate, stream.width, stream.height)
            assert shown == ("h264", 25, 64, 48)
            assert len(list(container.decode(stream))) == 12


def test_a_seed_fixes_every_byte_however_many_videos_are_written(tmp_path: Path) -> None:
    settings = {"num_frames": 4, "size": SIZE}
    write_motion_videos(tmp_path / "few", videos_per_class=1, seed=5, **settings)
    write_motion_videos(tmp_path / "more", videos_per_class=3, seed=5, **settings)
    write_motion_videos(tmp_path / "other", videos_per_class=1, seed=6, **settings)
    few, more, other = (_contents(tmp_path / name) for name in ("few", "more", "other"))
    assert few.items() <= more.items()
    assert not set(few.values()) & set(other.values())
    assert len(set(more.values())) == 18


def test_a_video_is_a_few_kilobytes(tmp_path: Path) -> None:
    write_motion_videos(tmp_path, videos_per_class=1, seed=0)
    assert max(map(len, _contents(tmp_path).values())) < 32_000


@pytest.mark.parametrize("wrong", [{"videos_per_class": 0}, {"num_frames": 0}, {"size": (65, 48)}, {"size": (8, 8)}])
def test_sizes_that_cannot_be_meant_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="even sides of at least 16 px"):
        write_motion_videos(tmp_path, **{"videos_per_class": 1, "seed": 0, **wrong})


def _frame_features(first: int, count: int) -> tuple[Floats, npt.NDArray[np.intp]]:
    """Pixels, edges and brightness of one random frame of each of `count` videos per class, and their labels."""
    rng = np.random.default_rng(first)
    features = []
    for index in range(first, first + count):
        for label, name in enumerate(CLASSES):
            frame = render_frame(_scene(label, index, SIZE), name, int(rng.integers(100)))
            grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32)
            edges = cv2.resize(np.abs(cv2.Laplacian(grey, cv2.CV_32F)), (8, 6), interpolation=cv2.INTER_AREA)
            small = cv2.resize(frame, (8, 6), interpolation=cv2.INTER_AREA)
            features.append(np.concatenate([small.ravel(), edges.ravel(), np.histogram(grey, 16, (0, 256))[0]]))
    return np.array(features, np.float64), np.tile(np.arange(len(CLASSES)), count)


def test_single_frames_tell_nothing() -> None:
    (x, y), (x_test, y_test) = _frame_features(0, 150), _frame_features(150, 150)
    x, x_test = (x - x.mean(0)) / x.std(0), (x_test - x.mean(0)) / x.std(0)
    means = np.stack([x[y == label].mean(0) for label in range(6)])
    nearest = np.square(x_test[:, None] - means).sum(2).argmin(1)
    linear = (x_test @ np.linalg.solve(x.T @ x + 300 * np.eye(x.shape[1]), x.T @ np.eye(6)[y])).argmax(1)
    # Chance is 1/6; with 900 frames 0.21 is 3.5 standard errors above it.
    assert (nearest == y_test).mean() < 0.21
    assert (linear == y_test).mean() < 0.21


def _outward(flow: npt.NDArray[np.float32]) -> float:
    """Mean motion away from the centre of each moving region, over all pixels of an (H, W, 2) flow."""
    count, regions = cv2.connectedComponents((np.hypot(flow[..., 0], flow[..., 1]) > 0.15).astype(np.uint8))
    total = 0.0
    for region in range(1, count):
        places = np.argwhere(regions == region)[:, ::-1]
        arms = places - places.mean(0)
        total += (flow[regions == region] * arms).sum() / max(np.hypot(*arms.T).mean(), 1)
    return total / flow[..., 0].size


def _motion(frames: list[npt.NDArray[np.uint8]]) -> Floats:
    """Rightward, downward and outward motion of (H, W, 3) frames, in pixels a frame."""
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    pairs = pairwise(grey)
    flows = [cv2.calcOpticalFlowFarneback(*pair, None, 0.5, 2, 11, 3, 5, 1.1, 0) for pair in pairs]
    return np.median([[*flow.reshape(-1, 2).mean(0), _outward(flow)] for flow in flows], axis=0)


def test_three_numbers_of_flow_tell_all_classes_apart() -> None:
    signs = [("left", "right"), ("up", "down"), ("shrink", "grow")]
    right = []
    for label, name in enumerate(CLASSES):
        for index in range(8):
            scene = _scene(label, index, (128, 96))
            motion = _motion([render_frame(scene, name, t) for t in range(9)])
            strongest = int(np.abs(motion).argmax())
            right.append(signs[strongest][int(motion[strongest] > 0)] == name)
    assert np.mean(right) >= 0.95


def test_broken_videos_give_no_frame(tmp_path: Path) -> None:
    write_broken_videos(tmp_path)
    assert sorted(_contents(tmp_path)) == ["audio_only.mp4", "empty.mp4", "text.mp4", "truncated.mp4"]
    for name in ("empty", "text", "truncated"):
        with pytest.raises(av.error.InvalidDataError):
            av.open(str(tmp_path / f"{name}.mp4"))
    with av.open(str(tmp_path / "audio_only.mp4")) as container:
        assert (len(container.streams.video), len(container.streams.audio)) == (0, 1)
