"""What a small run waits for: from the command to the first result, and from the last one to the prompt.

    python benchmarks/start_up.py --rounds 3

Each job is a process that starts a Ray of its own, as on a laptop, on videos that take next to no time. Beside them one
that imports torch and ray, starts a Ray and ends it, which is the least that a job on Ray can take. Quiet machine,
please: Ray starts a dozen processes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tyro

from jobs.extraction_log import format_table
from pipelines.datasets.motion_videos import write_motion_videos

ROOT = Path(__file__).resolve().parents[1]
BARE = "import torch, ray; ray.init(address='local', include_dashboard=False); print('ray', flush=True); ray.shutdown()"
# What is in the lines that tell of a Ray that is there, of the first result and of the last.
MARKS = {
    "a Ray that is started and ended": ("ray", "ray", "ray"),
    "extract_flow": ("ray  ", "frames/s", "look at"),
    "train": ("ray  ", "step  ", "look at"),
}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Start the jobs one after the other, several times, and take medians."""

    rounds: int = 3
    """How often each is run."""
    json: bool = False
    """Print one line of all figures as JSON, in place of the table."""


def main() -> None:
    config = tyro.cli(Benchmark)
    measured: dict[str, list[tuple[float, ...]]] = {name: [] for name in MARKS}
    with tempfile.TemporaryDirectory() as folder:
        write_motion_videos(Path(folder) / "videos", videos_per_class=2, seed=0, num_frames=25, size=(64, 48))
        for number in range(config.rounds):
            for name, command in make_commands(Path(folder), number).items():
                measured[name].append(follow(command, MARKS[name]))
    medians = {name: [statistics.median(times) for times in zip(*runs, strict=True)] for name, runs in measured.items()}
    show(medians, as_json=config.json)


def make_commands(folder: Path, number: int) -> dict[str, list[str]]:
    """By what they measure; those of another round write elsewhere."""
    shards, run = folder / f"shards{number}", folder / f"run{number}"
    job = [sys.executable, str(ROOT / "jobs" / "extract_flow.py"), "--videos", str(folder / "videos")]
    train = [sys.executable, str(ROOT / "jobs" / "train.py"), "--data", str(shards), "--output", str(run)]
    train += ["--stream", "flow", "--preset", "debug", "--steps", "10", "--num-workers", "1", "--num-gpus", "0"]
    commands = [[sys.executable, "-c", BARE], [*job, "--output", str(shards), "--short-side", "40"], train]
    return dict(zip(MARKS, commands, strict=True))


def follow(command: list[str], marks: tuple[str, str, str]) -> tuple[float, float, float, float]:
    """Seconds from the command to a line with each mark, and to its end. Raises where it fails."""
    begun, found = time.monotonic(), dict.fromkeys(marks, 0.0)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            for mark in marks:
                if mark in line and not found[mark]:
                    found[mark] = time.monotonic() - begun
    if process.returncode or not all(found.values()):
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode} and told {found}")
    ray, first, last = (found[mark] for mark in marks)
    return ray, first, last, time.monotonic() - begun


def show(medians: Mapping[str, list[float]], *, as_json: bool) -> None:
    """The figures, and how many times a bare Ray's seconds each job takes."""
    bare, *jobs = medians
    least = medians[bare][-1]
    over = {name: medians[name][-1] / least for name in medians}
    if as_json:
        names = ("ray_s", "first_s", "last_s", "all_s")
        figures = {f"{job}_{name}": medians[job][place] for job in jobs for place, name in enumerate(names)}
        print(json.dumps({"ray_s": least, **figures, **{f"{job}_over_ray": over[job] for job in jobs}}))
        return
    rows = []
    for name, (ray, first, last, whole) in medians.items():
        seconds = (f"{value:.1f}" for value in (ray, first, whole - last, whole, over[name]))
        rows.append((name, *seconds))
    print(format_table(("", "Ray s", "first result s", "from the last to the prompt s", "all s", "× a Ray"), rows))


if __name__ == "__main__":
    main()
