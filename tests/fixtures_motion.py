"""A small data set of shards for training and evaluation: real files, one of them broken, one named but not there."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from extracted import extract_here, plan_here
from filelock import FileLock

from pipelines.datasets.motion_videos import CLASSES, write_motion_videos
from pipelines.datasets.shards import ShardSettings
from pipelines.extraction.plan import ExtractionSettings
from pipelines.media.decode import DecodeSettings

SETTINGS = ExtractionSettings(decode=DecodeSettings(short_side=40), shards=ShardSettings(videos_per_shard=5))


@pytest.fixture(scope="session")
def motion_shards(ray_here: None, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> str:
    """Shards of 6 classes with 2 training and 1 test video each; of the test split one more is broken, one missing.

    The processes of one run of pytest share them: none may write there.
    """
    together = tmp_path_factory.getbasetemp().parent if worker_id != "master" else tmp_path_factory.getbasetemp()
    folder = together / "motion"
    with FileLock(together / "motion.lock"):
        if not (folder / "shards" / "dataset.json").exists():
            make_shards(folder)
    return str(folder / "shards")


def make_shards(folder: Path) -> None:
    write_motion_videos(folder / "videos", videos_per_class=3, seed=0, num_frames=25, size=(64, 48))
    (folder / "videos" / "test" / "up" / "broken.mp4").write_text("This is not a video.\n")
    paths = sorted(path.relative_to(folder / "videos") for path in (folder / "videos").rglob("*.mp4"))
    rows = [(str(path), path.parts[1], path.parts[0]) for path in paths]
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows, ("test/left/ghost.mp4", "left", "test")])
    videos, annotations = str(folder / "videos"), str(folder / "list.csv")
    extract_here(plan_here(videos, str(folder / "shards"), annotations=annotations, settings=SETTINGS))
    assert len(CLASSES) == 6
