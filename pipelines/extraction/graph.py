"""The Ray Data graph that turns a plan into shards of RGB and flow.

    planned rows, one block per shard, in a fixed order
      .map_batches(make_shard)    one batch = one shard = one task

A video is one stream of frames through decode, flow and encode, and goes into the shard's file when it is done, so a
task holds the compressed bytes of one video, however many a shard has. Flow is computed in the task, and then no frame
passes through the object store, or by actors that hold GPUs, to which the task sends batches of grey frames
(flow_pool.py). Shards are padded to `videos_per_shard` rows with empty ones, so that a batch never straddles two
shards, whichever way Ray cuts its blocks. A video that fails stays a row, with the reason, and ends in the quarantine
table.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from pipelines import storage, tvl1
from pipelines.datasets import shards
from pipelines.datasets.shards import ROW_SCHEMA, VIDEO_SCHEMA, Row
from pipelines.errors import BackendError, OutageError, RunError, VideoError
from pipelines.extraction import fleet, metrics
from pipelines.extraction.flow_actor import FlowTask
from pipelines.extraction.flow_pool import FlowPool, open_pool
from pipelines.extraction.metrics import Stopwatch
from pipelines.extraction.plan import ExtractionSettings, Plan, make_convention
from pipelines.extraction.progress import Progress, watch_progress
from pipelines.extraction.tally import Tally
from pipelines.extraction.work import PLAN_SCHEMA
from pipelines.media import codec
from pipelines.media.decoder_process import process_decoder
from pipelines.ray_data import ON_CPU, plain_errors, quieten
from pipelines.scratch import FULL_DISK, NoRoomError

logger = logging.getLogger(__name__)

ERROR_SAMPLE_FRAMES = 32  # flow frames of a sampled video whose error is measured

# A set that keeps its order: the schemas share columns.
FINISHED_COLUMNS = tuple(dict.fromkeys([*PLAN_SCHEMA.names, *VIDEO_SCHEMA.names, *ROW_SCHEMA.names, "kernel"]))

USED_UP = (*FULL_DISK, errno.EMFILE, errno.ENFILE)  # what a machine has run out of is no fault of a video

Flow = npt.NDArray[np.float32]  # (H, W, 2), px
GreyFrame = npt.NDArray[np.uint8]  # (H, W)


class OtherKernelError(BackendError):
    """A node of another processor family, or a GPU of another kind, than the data set is made on."""


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
class Steps:
    """What the graph does with one row, and with the batch of a shard. No Ray in here, so tests call it.

    A row is a dict with the columns of PLAN_SCHEMA; extract adds those of a shard's row. The actors of a pool compute
    the flow; where there is no pool, `backend` does in this process.
    """

    output: str
    settings: ExtractionSettings
    backend: str
    kernel: str
    fingerprint: str
    pool: FlowPool | None = None
    progress: Progress | None = None

    @classmethod
    def of(cls, plan: Plan, *, backend: str, pool: FlowPool | None = None, progress: Progress | None = None) -> Steps:
        """The steps of a plan, with flow computed by `backend` or by the actors of a pool."""
        return cls(
            output=plan.output,
            settings=plan.settings,
            backend=backend,
            kernel=plan.kernel,
            fingerprint=plan.fingerprint,
            pool=pool,
            progress=progress,
        )

    def extract(self, row: Row) -> Row:
        """Decode, flow and encode as one stream, frame by frame: memory does not grow with the video's length."""
        if row["status"] == "new":
            row = _attempt(row, self._extract)
        return self._finish(row)

    def make_shard(self, batch: pa.Table) -> pa.Table:
        """Extract the videos of one shard and commit it; returns one row of counts. An error here ends the run."""
        if self.pool is None:
            self._check_kernel(tvl1.kernel_target(self.backend))
        planned = [row for row in batch.to_pylist() if row["status"] != "pad"]
        # Unpacked, so that a batch with rows of two shards fails.
        (name,) = {row["shard"] for row in planned}
        with self._measure() as clock, clock.of("commit"):
            commit = shards.commit_shard(
                self.output,
                name,
                clock.without(self._finish_rows(name, planned)),
                settings=self.settings.shards,
                convention=make_convention(self.settings, self.kernel),
                fingerprint=self.fingerprint,
            )
        return pa.table({"shard": [name], "videos": [commit.num_rows], "bytes": [commit.num_bytes]})

    def _finish_rows(self, name: str, planned: list[Row]) -> Iterator[Row]:
        """The rows of a shard with what became of them, in order, each made when it is asked for."""
        kept = self._read_kept(name, [row for row in planned if row["status"] == "kept"])
        for row in planned:
            if row["status"] == "kept":
                yield next(kept)
            else:
                row = self.extract(row)
                self._check_kernel(row["kernel"])
                yield row
            del row  # before the next one is made

    def _extract(self, row: Row) -> Row:
        with self._measure() as clock, ExitStack() as stack, clock.of("encode"):
            with clock.of("fetch"):
                path = stack.enter_context(_fetch(row))
            video = _Video(path, row, self.settings, clock)
            # By the place in the catalog: every start of the command measures the same videos.
            flow = _Flow(self, sampled=row["index"] % self.settings.error_sample_every == 0)
            # Draws all frames through; what the video knows of itself is complete only after it.
            encoded = self._encode(flow, video, clock)
            return {**video.facts(), **encoded, "kernel": flow.kernel}

    @contextmanager
    def _measure(self) -> Iterator[Stopwatch]:
        """A stopwatch whose times are counted, whatever becomes of the video, where this is a task of Ray's."""
        clock = Stopwatch()
        try:
            yield clock
        finally:
            if self.progress:
                metrics.count_seconds(clock.seconds)

    def _encode(self, flow: _Flow, video: Iterable[GreyFrame], clock: Stopwatch) -> Row:
        encoder: codec.FlowEncoder | None = None
        for image, counts in clock.through("flow", flow.levels(clock.through("encode", video))):
            if encoder is None:
                height, width = image.shape[0] // 2, image.shape[1]
                encoder = codec.FlowEncoder(
                    self.settings.codec, height=height, width=width, fps=self.settings.decode.fps
                )
            encoder.write_levels(image, counts)
        if encoder is None:  # a video of one frame has no flow
            return {"status": "ok", "flow": b"", "flow_mean": 0.0, "flow_clipped": 0.0}
        encoded = encoder.close()
        return {
            "status": "ok",
            "flow": encoded,
            "flow_mean": encoder.mean_magnitude,
            "flow_clipped": encoder.clipped_share,
            **self._measure_error(encoded, flow.sample),
        }

    def _measure_error(self, data: bytes, sample: list[Flow]) -> Row:
        if not sample:
            return {}
        decoded = codec.decode_flow(data, self.settings.codec.flow_convention(), stop=len(sample))
        error = codec.flow_error(np.stack(sample), decoded, self.settings.codec.bound)
        return {f"flow_error_{name}": value for name, value in asdict(error).items()}

    def _finish(self, row: Row) -> Row:
        if self.progress and row["status"] in ("ok", "quarantined"):
            frames = row.get("num_frames") or 0
            self.progress(frames=frames, quarantined=row["status"] == "quarantined")
            metrics.count_video(frames=frames, error_kind=row.get("error_kind"))
        return {name: row.get(name) for name in FINISHED_COLUMNS}  # all of them, whatever became of the row

    def _check_kernel(self, kernel: str | None) -> None:
        if kernel not in (None, self.kernel):
            raise OtherKernelError(
                f"this worker's flow kernel is {kernel!r}, the data set's is {self.kernel!r}: float results differ "
                "between processor families. Use workers of one kind, or set NUMBA_CPU_NAME on all of them"
            )

    def _read_kept(self, name: str, kept: list[Row]) -> Iterator[Row]:
        """The rows that a retry takes over from the shard that is there, which must be the one that was committed."""
        if not kept:
            return
        uri = shards.shard_uri(self.output, name, self.settings.shards.extension)
        # Else the new record would vouch for bytes that have changed since they were written.
        whole = shards.fits(self.output, shards.read_commit(self.output, name))
        stored = shards.read_rows(uri) if whole else iter(())
        for row in kept:
            found = next((other for other in stored if other["id"] == row["id"]), None)
            if found is None:
                raise RunError(
                    f"{uri} is not as it was committed, so its videos cannot be kept: run the same command with "
                    "--verify, which makes damaged shards again, or restore the file from a copy"
                )
            yield {**row, **found, "status": "ok"}


class _Video:
    """The frames of one video on their way: each goes into the RGB encoding and is passed on in grey."""

    def __init__(self, path: str, row: Row, settings: ExtractionSettings, clock: Stopwatch) -> None:
        self.path, self.settings, self.clock = path, settings, clock
        self.stamp = _stamp(path)
        self.frames = process_decoder(settings.decode).frames(path, start=row["start"], end=row["end"])
        self.encoder: codec.RGBEncoder | None = None
        self.size = (0, 0)
        self.num_frames = 0

    def __iter__(self) -> Iterator[GreyFrame]:
        for frame in self.clock.through("decode", self.frames):
            if self.encoder is None:
                self.size = height, width = frame.shape[:2]
                fps = self.settings.decode.fps
                self.encoder = codec.RGBEncoder(self.settings.codec, height=height, width=width, fps=fps)
            self.encoder.write(frame)
            self.num_frames += 1
            # Of the frame after resizing: flow that is resized itself would need its vectors scaled.
            yield cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)

    def facts(self) -> Row:
        """The columns of a shard row that are known once all frames have passed, `rgb` among them."""
        assert self.encoder is not None, "the decoder raises where there is no frame"
        return {
            "source_sha256": self._hash(),
            "num_frames": self.num_frames,
            "height": self.size[0],
            "width": self.size[1],
            "fps": self.settings.decode.fps,
            "source_fps": self.frames.info.source_fps,
            "timing": self.frames.info.timing,
            "partial": self.frames.info.partial,
            "rgb": self.encoder.close(),
        }

    def _hash(self) -> str:
        """Of the file that was decoded, which must be there still."""
        try:
            sha256 = storage.hash_file(self.path)
            changed = _stamp(self.path) != self.stamp
        except FileNotFoundError:
            changed = True
        if changed:
            raise VideoError("changed", "the file was replaced, or written to, while it was decoded")
        return sha256


def _stamp(path: str) -> tuple[int, ...] | None:
    """What changes with a file's content; None where there is no file."""
    try:
        status = Path(path).stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class _Flow:
    """The flow of one video on its way: its codes, and as floats the first frames of a sampled one."""

    def __init__(self, steps: Steps, *, sampled: bool) -> None:
        self.steps = steps
        self.num_samples = ERROR_SAMPLE_FRAMES if sampled else 0
        self.sample: list[Flow] = []
        self.kernel: str | None = None  # what computed it

    def levels(self, grey: Iterable[GreyFrame]) -> Iterator[tuple[codec.Levels, codec.FlowCounts | None]]:
        """Stacked codes (2H, W), frame by frame, with their counts where they are known."""
        return self._levels_here(grey) if self.steps.pool is None else self._levels_of(self.steps.pool, grey)

    def _levels_here(self, grey: Iterable[GreyFrame]) -> Iterator[tuple[codec.Levels, None]]:
        settings, backend = self.steps.settings, self.steps.backend
        self.kernel = tvl1.kernel_target(backend)
        for flow in tvl1.iter_flow(grey, preset=settings.flow_preset, backend=backend):
            if len(self.sample) < self.num_samples:
                self.sample.append(flow.copy())
            yield codec.stack_components(codec.quantise(flow, settings.codec.flow_scale)), None

    def _levels_of(
        self, pool: FlowPool, grey: Iterable[GreyFrame]
    ) -> Iterator[tuple[codec.Levels, codec.FlowCounts | None]]:
        for batch in pool.stream(grey, self.num_samples):
            self.kernel = batch.kernel
            self.sample.extend(batch.sample)
            yield from zip(batch.levels, batch.counts, strict=True)


@contextmanager
def _fetch(row: Row) -> Iterator[str]:
    """A local path of the video. What is wrong with one file costs that file; a storage that is down ends the run."""
    uri = row["path"]
    try:
        with ExitStack() as stack:
            try:
                path = stack.enter_context(storage.local_copy(uri))
            except (FileNotFoundError, PermissionError) as error:
                raise VideoError("unreadable", f"the file could not be fetched: {error}") from error
            except NoRoomError as error:
                raise VideoError("no_room", f"the file could not be fetched: {error.strerror}") from error
            except OutageError:
                raise
            except OSError as error:
                raise OutageError(f"{uri} could not be fetched: {error}") from error
            yield path
    except (VideoError, OSError):
        storage.check_answers(uri.removesuffix(f"/{row['source']}"))  # without it any video looks broken
        raise


def _attempt(row: Row, step: Callable[[Row], Row]) -> Row:
    """The row with what the step adds, or quarantined with stage, kind and message."""
    cv2.setNumThreads(1)  # a task reserves one CPU; OpenCV would take them all
    try:
        return {**row, **step(row)}
    except (OutageError, BackendError):
        raise
    except VideoError as error:
        stage, kind, message = "decode", str(error.kind), error.message
    # The one broad except of the graph: whatever else a video does to a library costs that video, not the run.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in USED_UP:
            raise OutageError(f"{socket.gethostname()}: {error}. Make room there, then run again") from error
        logger.exception("video %s failed", row["id"])
        stage, kind, message = "flow", type(error).__name__, str(error)
    message = message.encode(errors="replace").decode()  # file names may hold what no table can
    return {**row, "status": "quarantined", "stage": stage, "error_kind": kind, "error_message": message, "rgb": None}


def build_graph(blocks: Iterable[pa.Table], steps: Steps, placement: Placement) -> ray.data.Dataset:
    """The lazy graph over blocks of one shard each; its rows are the counts of the shards, in order."""
    size = steps.settings.shards.videos_per_shard
    # A block a shard: so 250,000 rows are planned in 81 s, with a block a row in 15 minutes.
    graph = ray.data.from_arrow(list(blocks))
    options: dict[str, Any] = {**ON_CPU, "memory": fleet.reserve_memory(placement.task_bytes)}
    if steps.pool is None:
        options["label_selector"] = fleet.select_nodes(placement.left_out)
    return graph.map_batches(make_or_leave, batch_size=size, batch_format="pyarrow", fn_args=(steps,), **options)


def make_or_leave(batch: pa.Table, steps: Steps) -> pa.Table:
    """Make one shard, or leave it to others where this node computes other flow: its id is in `left_by` then."""
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


def run_graph(blocks: Iterable[pa.Table], steps: Steps, placement: Placement) -> Iterator[Row]:
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
    """What an extraction still has to do."""

    shards: int
    videos: int  # whose files are there


def extract(
    plan: Plan,
    blocks: Sequence[pa.Table],
    *,
    backend: str,
    placement: Placement,
    pool: FlowPool | None = None,
    on_tally: Callable[[Tally], None] = lambda tally: None,
    tally_every_s: float = 5.0,
) -> Iterator[Remaining]:
    """Make the shards of `blocks`, which `find_work` found; yields what remains, at first and after each shard.

    pool: actors that are up already; None: those of the placement, for as long as this takes.
    Ray must be running, and the caller hold the output's lock. Whatever stops it, finding the work anew and the same
    call go on where it stopped.
    """
    videos = {block["shard"][0].as_py(): pc.sum(pc.equal(block["status"], "new")).as_py() for block in blocks}
    yield Remaining(shards=len(blocks), videos=sum(videos.values()))
    if not blocks:
        return
    storage.delete(storage.join(plan.output, "dataset.json"))  # a retry makes some of its hashes untrue
    with nullcontext(pool) if pool else start_actors(plan.settings, backend, placement) as actors:
        busy = actors.busy_seconds if actors else None
        with watch_progress(on_tally, busy_seconds=busy, every_s=tally_every_s) as progress:
            steps = Steps.of(plan, backend=backend, pool=actors, progress=progress)
            for row in run_graph(blocks, steps, replace(placement, task_bytes=plan.task_bytes)):
                del videos[row["shard"]]
                yield Remaining(shards=len(videos), videos=sum(videos.values()))


def start_actors(
    settings: ExtractionSettings, backend: str, placement: Placement
) -> AbstractContextManager[FlowPool | None]:
    """The flow actors of a placement, which come up while the caller does other things; None where it has none."""
    if not placement.flow_actors:
        return nullcontext(None)
    task = FlowTask(backend=backend, preset=settings.flow_preset, scale=settings.codec.flow_scale)
    return open_pool(task, num_actors=placement.flow_actors, gpus_per_actor=placement.gpus_per_actor)
