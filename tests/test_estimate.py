"""The extrapolation of --dry-run from a few videos that are really extracted."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.datasets.catalog import read_catalog
from pipelines.datasets.motion_videos import write_motion_videos
from pipelines.extraction.estimate import estimate
from pipelines.extraction.graph import Steps
from pipelines.extraction.plan import ExtractionSettings, Plan, make_plan
from pipelines.media.codec import CodecSettings
from pipelines.media.decode import DecodeSettings

SETTINGS = ExtractionSettings(decode=DecodeSettings(short_side=32), codec=CodecSettings(flow_codec="h264"))
NUM_FRAMES = 5


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Good videos of five frames, and a broken one."""
    folder = tmp_path_factory.mktemp("videos")
    write_motion_videos(folder, videos_per_class=2, seed=1, num_frames=NUM_FRAMES, size=(48, 32))
    some_class = next(path.parent for path in sorted(folder.rglob("*.mp4")))
    (some_class / "broken.mp4").write_bytes(b"no video at all")
    output = str(folder / "out")
    return make_plan(read_catalog(str(folder)), SETTINGS, videos=str(folder), output=output, kernel="opencv")


@pytest.fixture
def steps(plan: Plan) -> Steps:
    return Steps(output=plan.output, settings=SETTINGS, backend="opencv", kernel="opencv", fingerprint=plan.fingerprint)


def test_a_sample_of_all_counts_all(plan: Plan, steps: Steps) -> None:
    found = estimate(plan, steps, num_samples=1000)
    assert (found.videos, found.sampled, found.failed) == (len(plan.table), len(plan.table), 1)
    assert found.frames == NUM_FRAMES * (found.videos - 1)
    assert 0 < found.core_seconds_low <= found.core_seconds <= found.core_seconds_high


def test_a_part_is_extrapolated_and_nothing_written(plan: Plan, steps: Steps) -> None:
    found = estimate(plan, steps, num_samples=2)
    assert found.sampled == 2
    assert found.frames == pytest.approx(NUM_FRAMES * (2 - found.failed) * found.videos / 2, abs=1)
    assert found.num_bytes > 0
    assert not Path(plan.output).exists()


def test_no_sample_is_refused(plan: Plan, steps: Steps) -> None:
    with pytest.raises(ValueError, match="--dry-run-samples is 0"):
        estimate(plan, steps, num_samples=0)


def test_after_enough_seconds_no_further_video_is_sampled(plan: Plan, steps: Steps) -> None:
    found = estimate(plan, steps, num_samples=1000, enough_s=0)
    assert (found.videos, found.sampled) == (len(plan.table), 1)
    assert found.core_seconds == found.core_seconds_low == found.core_seconds_high
