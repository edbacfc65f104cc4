"""What an extraction will take, from a few of its videos that are extracted here and now."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pipelines.datasets.shards import Row
from pipelines.errors import SettingsError
from pipelines.extraction.tasks import TaskSteps
from pipelines.extraction.work import PlannedWork


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Extrapolated linearly from `sampled` videos to `videos`; one core's seconds."""

    videos: int
    sampled: int
    failed: int  # of the sampled
    frames: int
    core_seconds: float
    core_seconds_low: float  # if all videos were like the cheapest of the sample
    core_seconds_high: float  # if all were like the dearest
    num_bytes: int


def estimate(plan: PlannedWork, steps: TaskSteps, *, num_samples: int, enough_s: float = 30.0) -> Estimate:
    """Extract `num_samples` videos, evenly spread over those that are there, in this process, and extrapolate.

    After `enough_s` seconds no further video is begun.
    """
    if num_samples < 1:
        raise SettingsError(f"--dry-run-samples is {num_samples}: it must be at least 1")
    present = plan.table.filter(plan.table["path"].is_valid())
    count = min(num_samples, len(present))
    rows = present.take([i * len(present) // count for i in range(count)]).to_pylist()
    steps.warm_up(rows[0])
    seconds: list[float] = []
    done: list[Row] = []
    for row in rows:
        if sum(seconds) > enough_s:
            break
        started = time.perf_counter()
        done.append(steps.extract(row))
        seconds.append(time.perf_counter() - started)
    # Only for frames and bytes: videos that fail take their time too.
    usable = [row for row in done if row["status"] == "ok"]
    count = len(done)
    scale = len(present) / count
    return Estimate(
        videos=len(present),
        sampled=count,
        failed=count - len(usable),
        frames=round(scale * sum(row["num_frames"] for row in usable)),
        core_seconds=scale * sum(seconds),
        core_seconds_low=len(present) * min(seconds),
        core_seconds_high=len(present) * max(seconds),
        num_bytes=round(scale * sum(map(steps.count_bytes, usable))),
    )
