"""What a task makes of a shard's videos: RGB and flow, as the rows of a file.

A video is one stream of frames through decode, flow and encode, and goes into the shard's file when it is done, so a
task holds the compressed bytes of one video, however many a shard has. Flow is computed in the task, and then no frame
passes through the object store, or by actors that hold GPUs, to which the task sends batches of grey frames
(flow_pool.py). How tasks become a graph is in tasks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines import tvl1
from pipelines.datasets import commits, shards
from pipelines.datasets.records import DATASET
from pipelines.datasets.shards import ROW_SCHEMA, VIDEO_SCHEMA, Row
from pipelines.errors import RunError
from pipelines.extraction.flow_actor import FlowTask
from pipelines.extraction.flow_pool import FlowPool, open_pool
from pipelines.extraction.metrics import Stopwatch
from pipelines.extraction.plan import ExtractionSettings, Plan, make_convention
from pipelines.extraction.progress import Progress
from pipelines.extraction.sources import HashedFile, fetch
from pipelines.extraction.tally import Tally
from pipelines.extraction.tasks import Placement, Remaining, TaskSteps, make_shards
from pipelines.extraction.work import PLAN_SCHEMA
from pipelines.lock import Claim
from pipelines.media import codec
from pipelines.media.decoder_process import process_decoder

ERROR_SAMPLE_FRAMES = 32  # flow frames of a sampled video whose error is measured

# A set that keeps its order: the schemas share columns.
FINISHED_COLUMNS = tuple(dict.fromkeys([*PLAN_SCHEMA.names, *VIDEO_SCHEMA.names, *ROW_SCHEMA.names, "kernel"]))

Flow = npt.NDArray[np.float32]  # (H, W, 2), px
GreyFrame = npt.NDArray[np.uint8]  # (H, W)


@dataclass(frozen=True, kw_only=True)
class Steps(TaskSteps):
    """Decode, flow and encode of one video, as one stream, frame by frame: memory does not grow with its length."""

    COLUMNS = FINISHED_COLUMNS
    STAGE = "flow"

    settings: ExtractionSettings

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

    @property
    def videos_per_shard(self) -> int:
        """Rows of a batch, empty ones included."""
        return self.settings.shards.videos_per_shard

    def find_kernel(self) -> str:
        """What computes flow in this process."""
        return tvl1.kernel_target(self.backend)

    def commit(self, name: str, rows: Iterable[Row]) -> tuple[int, int]:
        """Put a shard of finished rows, each as it comes, then its record; usable videos and bytes."""
        commit = shards.commit_shard(
            self.output,
            name,
            rows,
            settings=self.settings.shards,
            convention=make_convention(self.settings, self.kernel),
            fingerprint=self.fingerprint,
        )
        return commit.num_rows, commit.num_bytes

    def count_bytes(self, row: Row) -> int:
        """Bytes of a finished row's frames and flow."""
        return len(row["rgb"]) + len(row["flow"])

    def work(self, row: Row) -> Row:
        """What becomes of one video that is there: its facts, and its frames and flow as they are stored."""
        with self.measure() as clock, ExitStack() as stack, clock.of("encode"):
            with clock.of("fetch"):
                path = stack.enter_context(fetch(row))
            video = _Video(path, row, self.settings, clock)
            # By the place in the catalog: every start of the command measures the same videos.
            flow = _Flow(self, sampled=row["index"] % self.settings.error_sample_every == 0)
            # Draws all frames through; what the video knows of itself is complete only after it.
            encoded = self._encode(flow, video, clock)
            return {**video.facts(), **encoded, "kernel": flow.kernel}

    def _encode(self, flow: _Flow, video: _Video, clock: Stopwatch) -> Row:
        encoder: codec.FlowEncoder | None = None
        for image, counts in clock.through("flow", flow.levels(clock.through("encode", video))):
            if encoder is None:
                height, width = image.shape[0] // 2, image.shape[1]
                encoder = codec.FlowEncoder(self.settings.codec, height=height, width=width, fps=video.fps)
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

    def read_kept(self, name: str, kept: list[Row]) -> Iterator[Row]:
        """The rows that a retry takes over from the shard that is there, which must be the one that was committed."""
        if not kept:
            return
        uri = shards.shard_uri(self.output, name, self.settings.shards.extension)
        # Else the new record would vouch for bytes that have changed since they were written.
        whole = commits.fits(self.output, shards.read_commit(self.output, name))
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
        self.file = HashedFile(path)
        self.frames = process_decoder(settings.decode).frames(path, start=row["start"], end=row["end"])
        self.encoder: codec.RGBEncoder | None = None
        self.size = (0, 0)
        self.num_frames = 0

    def __iter__(self) -> Iterator[GreyFrame]:
        for frame in self.clock.through("decode", self.frames):
            if self.encoder is None:
                self.size = height, width = frame.shape[:2]
                self.encoder = codec.RGBEncoder(self.settings.codec, height=height, width=width, fps=self.fps)
            self.encoder.write(frame)
            self.num_frames += 1
            # Of the frame after resizing: flow that is resized itself would need its vectors scaled.
            yield cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)

    @property
    def fps(self) -> float:
        """Frames a second that a player is to show, from the first frame on."""
        assert self.frames.expected_fps is not None, "it comes before the first frame"
        return self.frames.expected_fps

    def facts(self) -> Row:
        """The columns of a shard row that are known once all frames have passed, `rgb` among them."""
        assert self.encoder is not None, "the decoder raises where there is no frame"
        return {
            "source_sha256": self.file.sha256(),
            "num_frames": self.num_frames,
            "height": self.size[0],
            "width": self.size[1],
            "fps": self.frames.info.fps,
            "source_fps": self.frames.info.source_fps,
            "timing": self.frames.info.timing,
            "partial": self.frames.info.partial,
            "rgb": self.encoder.close(),
        }


class _Flow:
    """The flow of one video on its way: its codes, and as floats the first frames of a sampled one."""

    def __init__(self, steps: Steps, *, sampled: bool) -> None:
        self.steps = steps
        self.num_samples = ERROR_SAMPLE_FRAMES if sampled else 0
        self.sample: list[Flow] = []
        self.kernel: str | None = None  # what computed it

    def levels(self, grey: Iterable[GreyFrame]) -> Iterator[tuple[codec.Codes, codec.FlowCounts | None]]:
        """Stacked codes (2H, W), frame by frame, with their counts where they are known."""
        return self._levels_here(grey) if self.steps.pool is None else self._levels_of(self.steps.pool, grey)

    def _levels_here(self, grey: Iterable[GreyFrame]) -> Iterator[tuple[codec.Codes, None]]:
        settings, backend = self.steps.settings, self.steps.backend
        self.kernel = tvl1.kernel_target(backend)
        for flow in tvl1.iter_flow(grey, preset=settings.flow_preset, backend=backend):
            if len(self.sample) < self.num_samples:
                self.sample.append(flow.copy())
            yield codec.stack_components(codec.quantise(flow, settings.codec.flow_scale)), None

    def _levels_of(
        self, pool: FlowPool, grey: Iterable[GreyFrame]
    ) -> Iterator[tuple[codec.Codes, codec.FlowCounts | None]]:
        for batch in pool.stream(grey, self.num_samples):
            self.kernel = batch.kernel
            self.sample.extend(batch.sample)
            yield from zip(batch.levels, batch.counts, strict=True)


def extract(
    plan: Plan,
    blocks: Sequence[pa.Table],
    *,
    backend: str,
    placement: Placement,
    pool: FlowPool | None = None,
    claim: Claim | None = None,
    on_tally: Callable[[Tally], None] = lambda tally: None,
    tally_every_s: float = 5.0,
) -> Iterator[Remaining]:
    """Make the shards of `blocks`, which `find_work` found; yields what remains, at first and after each shard.

    pool: actors that are up already; None: those of the placement, for as long as this takes.
    Ray must be running, and the caller hold the output's lock. Whatever stops it, finding the work anew and the same
    call go on where it stopped.
    """
    with nullcontext(pool) if pool or not blocks else start_actors(plan.settings, backend, placement) as actors:

        def make_steps(progress: Progress) -> Steps:
            return Steps.of(plan, backend=backend, pool=actors, progress=progress)

        yield from make_shards(
            plan,
            blocks,
            make_steps,
            record=DATASET,
            placement=placement,
            pool=actors,
            claim=claim,
            on_tally=on_tally,
            tally_every_s=tally_every_s,
        )


def start_actors(
    settings: ExtractionSettings, backend: str, placement: Placement
) -> AbstractContextManager[FlowPool | None]:
    """The flow actors of a placement, which come up while the caller does other things; None where it has none."""
    if not placement.flow_actors:
        return nullcontext(None)
    task = FlowTask(backend=backend, preset=settings.flow_preset, scale=settings.codec.flow_scale)
    return open_pool(task, num_actors=placement.flow_actors, gpus_per_actor=placement.gpus_per_actor)
