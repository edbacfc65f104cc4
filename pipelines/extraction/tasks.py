"""The Ray Data graph that turns planned rows into committed shards, whatever these hold.

    planned rows, one block per shard, in a fixed order
      .map_batches(make_shard)    one batch = one shard = one task

Shards are padded to `videos_per_shard` rows with empty ones, so that a batch never straddles two shards, whichever way
Ray cuts its blocks. A video that fails stays a row, with the reason, and ends in the quarantine table.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from pipelines import storage
from pipelines.datasets.shards import Row
from pipelines.errors import BackendError
from pipelines.extraction import fleet, metrics
from pipelines.extraction.flow_pool import ActorPool
from pipelines.extraction.metrics import Stopwatch
from pipelines.extraction.progress import Progress, watch_progress
from pipelines.extraction.sources import attempt
from pipelines.extraction.tally import Tally
from pipelines.extraction.work import PlannedWork
from pipelines.lock import Claim
from pipelines.ray_data import ON_CPU, plain_errors, quieten

WARM_UP_S = 0.5  # of video

logger = logging.getLogger(__name__)


class OtherKernelError(BackendError):
    """A node of another processor family, or a GPU of another kind, than the output is made on."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the steps run; it never changes what they compute.

    num_cpus        CPUs that the graph may use at a time; None: all there are
    flow_actors     actors on GPUs that compute flow; 0: flow runs in the CPU tasks
    gpus_per_actor  GPUs that each of them reserves; with one half, two share a GPU
    left_out        ids of nodes that make no shards
    task_bytes      memory that a task reserves, so that not more of them run on a node than it can hold; 0: none
    """

    num_cpus: int | None = None
    flow_actors: int = 0
    gpus_per_actor: float = 1.0
    left_out: tuple[str, ...] = ()
    task_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class TaskSteps:
    """What the graph does with one row, and with the batch of a shard. No Ray in here, so tests call it.

    A row is a dict with the columns of the plan; `extract` adds those of COLUMNS. The actors of a pool compute what
    wants a GPU; where there is no pool, `backend` does in this process.
    """

    COLUMNS: ClassVar[tuple[str, ...]]  # of a finished row
    STAGE: ClassVar[str]  # where failures come up that are not the file's

    output: str
    backend: str
    kernel: str
    fingerprint: str
    pool: Any = None  # an ActorPool
    progress: Progress | None = None
    claim: Claim | None = None  # None: nobody else writes there

    @property
    def videos_per_shard(self) -> int:
        """Rows of a batch, empty ones included."""
        raise NotImplementedError

    def work(self, row: Row) -> Row:
        """What becomes of one video that is there: what a finished row has more, its `status` among it.

        Raises VideoError, and whatever libraries do; such a video goes to quarantine.
        """
        raise NotImplementedError

    def find_kernel(self) -> str:
        """What computes in this process."""
        raise NotImplementedError

    def commit(self, name: str, rows: Iterable[Row]) -> tuple[int, int]:
        """Put a shard of finished rows, each as it comes, then its record; usable videos and bytes."""
        raise NotImplementedError

    def read_kept(self, name: str, kept: list[Row]) -> Iterator[Row]:
        """The rows that a retry takes over from the shard that is there, which must be the one that was committed."""
        raise NotImplementedError

    def count_bytes(self, row: Row) -> int:
        """Bytes that a finished row takes in the output."""
        raise NotImplementedError

    def warm_up(self, row: Row) -> None:
        """Load libraries and compile the kernel, which every node does once; the start of a video is enough for it."""
        begins = row["start"] or 0.0
        self.extract({**row, "start": begins, "end": begins + WARM_UP_S})

    def extract(self, row: Row) -> Row:
        """One row with what becomes of its video."""
        if row["status"] == "new":
            row = attempt(row, self.work, stage=self.STAGE)
        return self._finish(row)

    def make_shard(self, batch: pa.Table) -> pa.Table:
        """Extract the videos of one shard and commit it; returns one row of counts. An error here ends the run."""
        if self.pool is None:
            self.check_kernel(self.find_kernel())
        self.check_claim()
        planned = [row for row in batch.to_pylist() if row["status"] != "pad"]
        # Unpacked, so that a batch with rows of two shards fails.
        (name,) = {row["shard"] for row in planned}
        with self.measure() as clock, clock.of("commit"):
            num_rows, num_bytes = self.commit(name, clock.without(self._finish_rows(name, planned)))
        return pa.table({"shard": [name], "videos": [num_rows], "bytes": [num_bytes]})

    def _finish_rows(self, name: str, planned: list[Row]) -> Iterator[Row]:
        """The rows of a shard with what became of them, in order, each made when it is asked for."""
        kept = self.read_kept(name, [row for row in planned if row["status"] == "kept"])
        for row in planned:
            if row["status"] == "kept":
                yield next(kept)
            else:
                row = self.extract(row)
                self.check_kernel(row["kernel"])
                self.check_claim()
                yield row
            del row  # before the next one is made
        self.check_claim()  # what comes next is the commit

    def check_claim(self) -> None:
        """Raises OutputLockedError where the output is another run's by now.

        To a task that outlived its run videos look broken whose files are gone since: it would replace a good shard.
        """
        if self.claim is not None:
            self.claim.check()

    @contextmanager
    def measure(self) -> Iterator[Stopwatch]:
        """A stopwatch whose times are counted, whatever becomes of the video, where this is a task of Ray's."""
        clock = Stopwatch()
        try:
            yield clock
        finally:
            if self.progress:
                metrics.count_seconds(clock.seconds)

    def _finish(self, row: Row) -> Row:
        if self.progress and row["status"] in ("ok", "quarantined"):
            frames = row.get("num_frames") or 0
            self.progress(frames=frames, quarantined=row["status"] == "quarantined")
            metrics.count_video(frames=frames, error_kind=row.get("error_kind"))
        return {name: row.get(name) for name in self.COLUMNS}  # all of them, whatever became of the row

    def check_kernel(self, kernel: str | None) -> None:
        """Raises OtherKernelError where something was, or would be, computed by another kernel than planned."""
        if kernel not in (None, self.kernel):
            raise OtherKernelError(
                f"this worker's flow kernel is {kernel!r}, the data set's is {self.kernel!r}: float results differ "
                "between processor families. Use workers of one kind, or set NUMBA_CPU_NAME on all of them"
            )


def build_graph(blocks: Iterable[pa.Table], steps: TaskSteps, placement: Placement) -> ray.data.Dataset:
    """The lazy graph over blocks of one shard each; its rows are the counts of the shards, in order."""
    size = steps.videos_per_shard
    # A block a shard: so 250,000 rows are planned in 81 s, with a block a row in 15 minutes.
    graph = ray.data.from_arrow(list(blocks))
    options: dict[str, Any] = {**ON_CPU, "memory": fleet.reserve_memory(placement.task_bytes)}
    if steps.pool is None:
        options["label_selector"] = fleet.select_nodes(placement.left_out)
    return graph.map_batches(make_or_leave, batch_size=size, batch_format="pyarrow", fn_args=(steps,), **options)


def make_or_leave(batch: pa.Table, steps: TaskSteps) -> pa.Table:
    """Make one shard, or leave it to others where this node computes other numbers: its id is in `left_by` then."""
    try:
        counts, left_by = steps.make_shard(batch), None
    except OtherKernelError:
        if steps.pool is not None:
            raise
        counts = pa.table({"shard": batch["shard"][:1], "videos": [0], "bytes": [0]})
        left_by = ray.get_runtime_context().get_node_id()
    return counts.append_column("left_by", pa.array([left_by], pa.string()))


def configure_ray_data(placement: Placement) -> None:
    """Settings of Ray Data that the graph stands on, for this driver."""
    options = quieten().execution_options
    # Else Ray may put rows of two shards into one batch.
    options.preserve_order = True
    options.resource_limits = options.resource_limits.copy(cpu=placement.num_cpus)


def run_graph(blocks: Iterable[pa.Table], steps: TaskSteps, placement: Placement) -> Iterator[Row]:
    """Run the graph; yields the counts of each shard as it is committed.

    Shards that nodes of another processor family left are given to the other nodes, in another run of the graph.
    """
    configure_ray_data(placement)
    waiting = {block["shard"][0].as_py(): block for block in blocks}
    left_out = set(placement.left_out)
    while waiting:
        graph = build_graph(waiting.values(), steps, replace(placement, left_out=tuple(sorted(left_out))))
        with plain_errors():
            for row in graph.iter_rows():
                if row["left_by"] is None:
                    del waiting[row["shard"]]
                    yield row
                elif row["left_by"] not in left_out:
                    left_out.add(row["left_by"])
                    logger.warning("node %s makes no shards: it is of another processor family", row["left_by"])


@dataclass(frozen=True, kw_only=True)
class Remaining:
    """What a run still has to do."""

    shards: int
    videos: int  # whose files are there


def make_shards(
    plan: PlannedWork,
    blocks: Sequence[pa.Table],
    make_steps: Callable[[Progress], TaskSteps],
    *,
    record: str,
    placement: Placement,
    pool: ActorPool | None = None,
    claim: Claim | None = None,
    on_tally: Callable[[Tally], None] = lambda tally: None,
    tally_every_s: float = 5.0,
) -> Iterator[Remaining]:
    """Make the shards of `blocks`, which `find_work` found; yields what remains, at first and after each shard.

    `claim` is that of the lock on the output. `record` is the output's last file, which is removed first: a retry makes
    some of its hashes untrue. Ray must be running, and the caller hold the output's lock. Whatever stops it, finding
    the work anew and the same call go on where it stopped.
    """
    videos = {block["shard"][0].as_py(): pc.sum(pc.equal(block["status"], "new")).as_py() for block in blocks}
    yield Remaining(shards=len(blocks), videos=sum(videos.values()))
    if not blocks:
        return
    storage.delete(storage.join(plan.output, record))
    busy = pool.busy_seconds if pool else None
    with watch_progress(on_tally, busy_seconds=busy, every_s=tally_every_s) as progress:
        steps = replace(make_steps(progress), claim=claim)
        for row in run_graph(blocks, steps, replace(placement, task_bytes=plan.task_bytes)):
            del videos[row["shard"]]
            yield Remaining(shards=len(videos), videos=sum(videos.values()))
