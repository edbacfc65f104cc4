"""What a task makes of a shard's videos: the features of their windows.

A video is one stream of frames through decode, flow and the networks, of which no frame is held; its vectors lie on the
disk of the task's machine until it ends (spool.py). Without GPUs all of it is done in the task; with GPUs the task
sends batches of frames to actors (pool.py), and makes files of what comes back. How tasks become a graph is in
`pipelines.extraction.tasks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import pyarrow as pa
import torch

from pipelines import tvl1
from pipelines.datasets.shards import Row
from pipelines.extraction.metrics import Stopwatch
from pipelines.extraction.progress import Progress
from pipelines.extraction.sources import fetch
from pipelines.extraction.tally import Tally
from pipelines.extraction.tasks import Placement, Remaining, TaskSteps, make_shards
from pipelines.features.frames import StoredVideo, VideoFile
from pipelines.features.plan import STORED_SCHEMA, FeaturePlan
from pipelines.features.pool import Batch, FeaturePool, iter_batches, start_pool
from pipelines.features.records import VIDEO_SCHEMA
from pipelines.features.sidecar import SIDECAR
from pipelines.features.spool import Spool
from pipelines.features.store import commit_features, describe_vectors, read_kept
from pipelines.features.task import (
    FeatureTask,
    VideoFeatures,
    compute_features,
    find_kernel,
    keep_networks,
    solve_here,
)
from pipelines.features.windows import Windows
from pipelines.lock import Claim

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class FeatureSteps(TaskSteps):
    """Decode, flow and networks of one video, frame by frame: no frames are held but those of windows under way."""

    COLUMNS = tuple(dict.fromkeys([*STORED_SCHEMA.names, *VIDEO_SCHEMA.names, "vectors", "stored", "kernel"]))
    STAGE = "features"

    task: FeatureTask
    windows: Windows
    per_shard: int

    @classmethod
    def of(
        cls,
        plan: FeaturePlan,
        windows: Windows,
        *,
        backend: str,
        pool: FeaturePool | None = None,
        progress: Progress | None = None,
    ) -> FeatureSteps:
        """The steps of a plan, computed by `backend` in the tasks or by the actors of a pool."""
        return cls(
            output=plan.output,
            backend=backend,
            kernel=plan.kernel,
            fingerprint=plan.fingerprint,
            pool=pool,
            progress=progress,
            task=plan.task,
            windows=windows,
            per_shard=plan.per_shard,
        )

    @property
    def videos_per_shard(self) -> int:
        """Rows of a batch, empty ones included."""
        return self.per_shard

    def find_kernel(self) -> str:
        """What computes in this process."""
        return find_kernel(self.backend, computes_flow=self.task.computes_flow)

    def commit(self, name: str, rows: Iterable[Row]) -> tuple[int, int]:
        """Put a shard of finished rows, each as it comes, then its record; usable videos and bytes."""
        commit = commit_features(
            self.output, name, rows, task=self.task, windows=self.windows, fingerprint=self.fingerprint
        )
        usable = sum(video["status"] == "ok" for video in commit.videos)
        return usable, sum(file.num_bytes for file in commit.files)

    def read_kept(self, name: str, kept: list[Row]) -> Iterator[Row]:
        """The rows that a retry takes over from the shard that is there, which must be the one that was committed."""
        return read_kept(self.output, name, kept, self.task)

    def count_bytes(self, row: Row) -> int:
        """Bytes of a finished row's vectors."""
        return int(row["feature_bytes"])

    def warm_up(self, row: Row) -> None:
        """Load libraries and networks, which every worker does once, and compile the kernel."""
        if self.task.data is None:
            super().warm_up(row)
        else:
            self.extract(row)

    def work(self, row: Row) -> Row:
        """What becomes of one video that is there: its facts, and its features as they are written."""
        with self.measure() as clock, clock.of("features"):
            facts, spool, kernel = (self._read_video if self.task.data is None else self._read_stored)(row, clock)
        return {"status": "ok", **facts, **describe_vectors(spool.vectors), "kernel": kernel}

    def _read_video(self, row: Row, clock: Stopwatch) -> tuple[Row, Spool, str]:
        with ExitStack() as stack:
            with clock.of("fetch"):
                path = stack.enter_context(fetch(row))
            video = VideoFile(path, row, self.task)
            if self.pool is None:
                features, spool = self._open(), Spool()
                solve = solve_here(self.task, self.backend)
                compute_features(features, clock.through("decode", video), solve, spool, clock)
                spool.add(features.finish())
                return video.facts(), spool, self.find_kernel()

            def open_batches() -> Iterator[Batch]:
                nonlocal video
                video = VideoFile(path, row, self.task)  # anew: its frames can be read once
                for batch in iter_batches(clock.through("decode", video)):
                    yield "video", batch

            computed, kernel = self.pool.compute(open_batches)
            return video.facts(), computed, kernel

    def _read_stored(self, row: Row, clock: Stopwatch) -> tuple[Row, Spool, str]:
        with clock.of("fetch"):
            stored = StoredVideo(row, self.task)

        def open_batches() -> Iterator[Batch]:
            for stream in self.task.streams:
                for batch in clock.through("decode", stored.read(stream)):
                    yield stream, batch

        if self.pool is not None:
            computed, kernel = self.pool.compute(open_batches)
            return {}, computed, kernel
        features, spool = self._open(), Spool()
        for stream in self.task.streams:
            for batch in clock.through("decode", stored.read(stream)):
                for frame in batch:
                    features.push(stream, frame)
                spool.add(features.take())
        spool.add(features.finish())
        return {}, spool, self.find_kernel()

    def _open(self) -> VideoFeatures:
        networks = keep_networks(self.task, CPU)
        return VideoFeatures(networks, self.task.scales)


def extract(
    plan: FeaturePlan,
    windows: Windows,
    blocks: Sequence[pa.Table],
    *,
    backend: str,
    placement: Placement,
    pool: FeaturePool | None = None,
    claim: Claim | None = None,
    on_tally: Callable[[Tally], None] = lambda tally: None,
    tally_every_s: float = 5.0,
) -> Iterator[Remaining]:
    """Make the shards of `blocks`; see `pipelines.extraction.tasks.make_shards`.

    pool: actors that are up already; None: those of the placement, for as long as this takes.
    """
    with nullcontext(pool) if pool or not blocks else start_pool(plan.task, backend, placement) as actors:

        def make_steps(progress: Progress) -> FeatureSteps:
            return FeatureSteps.of(plan, windows, backend=backend, pool=actors, progress=progress)

        yield from make_shards(
            plan,
            blocks,
            make_steps,
            record=SIDECAR,
            placement=placement,
            pool=actors,
            claim=claim,
            on_tally=on_tally,
            tally_every_s=tally_every_s,
        )


def warm_worker(task: FeatureTask, backend: str | None) -> None:
    """Load what a worker process needs before its first task: where it computes itself, kernel and networks as well."""
    if backend is not None:
        if task.computes_flow:
            tvl1.prewarm(backend)
        keep_networks(task, CPU)
