"""Training clips from shards, streamed by Ray Data to each worker of a training.

Which clip comes when is arithmetic: the run's clips are numbered (`pipelines.clips.numbered`). Step s takes the next
`batch × workers` numbers, each worker its own part of them. So every worker takes the same number of steps, a run that
is resumed goes on with the very clip it would have had, and nothing depends on timing.

Each worker streams its own part: tasks on any node read the rows they need, decode only the window, and hand over
cropped frames as they are stored, RGB as uint8 and flow as codes; these cross the object store once and become floats
on the device that trains.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import ray
import ray.data
import torch
from ray.data import ExecutionResources
from torch import Tensor

from models import cuda
from pipelines.clips.numbered import TASK_BYTES, NumberedClips, WorkerPart
from pipelines.clips.source import ClipSource
from pipelines.clips.tensors import scale_clips
from pipelines.errors import OutageError
from pipelines.media.codec import FlowScale, check_convention
from pipelines.ray_data import MAX_WORKER_DEATHS, quieten

TASKS_AHEAD = 2  # whose clips may wait in the object store, for each worker
# A task cuts for two thirds of its time; for the rest its clips go to the object store, and the next task is coming.
CPUS_PER_TASK = 2 / 3
# Ray Data counts a task whose output it has not measured with two blocks of 128 MiB: with less room than that beside
# the clips that wait, it sometimes starts no task any more.
UNMEASURED_BYTES = 768 << 20
SEGMENT_TASKS = 2_000  # in one Ray Data execution, which describes all of them before the first one runs


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The clips of one worker in one step, on the CPU: streams (B, …, T, S, S, C) as they were cut."""

    streams: Mapping[str, Tensor]
    labels: Tensor  # (B,) int64
    weights: Tensor  # (B,) float32, 0 for a clip that could not be decoded
    errors: tuple[str, ...]
    numbers: tuple[int, ...]
    scale: FlowScale | None = None  # of flow in codes; None: in pixels

    def inputs(self, device: torch.device, bound: float) -> dict[str, Tensor]:
        """What the model takes: (B, …, C, T, S, S) float32 in [-1, 1] on the device; `bound` of flow in pixels."""
        moved = {stream: cuda.upload(clips, device) for stream, clips in self.streams.items()}
        return {stream: scale_clips(stream, clips, bound, self.scale) for stream, clips in moved.items()}


def stream_batches(clips: NumberedClips, part: WorkerPart, *, num_cpus: float) -> Iterator[Batch]:
    """This worker's batches, one a step, decoded ahead by Ray Data on `num_cpus` CPUs of the cluster.

    Where `num_cpus` is less than two tasks take, one decodes at a time.

    Raises ConventionError where the shards' flow is of no convention that this version knows, OutageError where the
    data set cannot be reached.
    """
    if "flow" in clips.input_spec.train.streams:
        check_convention(clips.videos.convention.flow)
    steps_at_once = max(1, SEGMENT_TASKS * clips.clips_per_task(part.batch) // part.batch)
    for done in range(0, part.steps, steps_at_once):
        segment = part.after(done, min(steps_at_once, part.steps - done))
        dataset = build_graph(clips, segment, num_cpus=num_cpus)
        try:
            for columns in dataset.iter_batches(batch_size=part.batch, batch_format="numpy", prefetch_batches=2):
                yield _to_batch(columns, clips)
        except OutageError as error:  # Ray's is one too, with a traceback before the message and advice after it
            raise OutageError(str(getattr(error, "cause", error)).partition("\n")[0]) from None


def begin(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, the first of which is made from now on, by a thread, and not from when it is asked for."""
    thread = ThreadPoolExecutor(max_workers=1)
    first = thread.submit(next, batches, None)
    thread.shutdown(wait=False)

    def follow() -> Iterator[Batch]:
        if (batch := first.result()) is not None:
            yield batch
            yield from batches

    return follow()


def build_graph(clips: NumberedClips, part: WorkerPart, *, num_cpus: float) -> ray.data.Dataset:
    """The lazy graph whose rows are the part's clips in order."""
    num_tasks = -(-part.steps * part.batch // clips.clips_per_task(part.batch))
    tasks_at_once = max(1, int(num_cpus / CPUS_PER_TASK + 1e-6))
    graph = ray.data.read_datasource(
        ClipSource(clips, part),
        override_num_blocks=num_tasks,
        # Rounded up, the last one would find no place.
        num_cpus=math.floor(min(CPUS_PER_TASK, num_cpus) * 1000) / 1000,
        concurrency=tasks_at_once,
        ray_remote_args={"max_retries": MAX_WORKER_DEATHS},
    )
    options = graph.context.execution_options
    options.preserve_order = True
    ahead = TASKS_AHEAD * tasks_at_once * TASK_BYTES + UNMEASURED_BYTES
    options.resource_limits = ExecutionResources(object_store_memory=ahead)
    quieten(graph.context)
    return graph


def _to_batch(columns: Mapping[str, npt.NDArray], clips: NumberedClips) -> Batch:
    return Batch(
        streams={stream: _as_tensor(columns[stream]) for stream in clips.input_spec.train.streams},
        labels=torch.tensor(columns["label"], dtype=torch.int64),
        weights=torch.tensor(columns["weight"]),
        errors=tuple(str(error) for error in columns["error"] if error),
        numbers=tuple(columns["number"].tolist()),
        scale=clips.scale,
    )


def _as_tensor(frames: npt.NDArray) -> Tensor:
    # Codes have ten bits at most, and torch does little with uint16.
    codes = frames.view(np.int16) if frames.dtype == np.uint16 else frames
    with warnings.catch_warnings():
        # Of memory that must not be written to, the object store's: `inputs` copies what it scales.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(codes)
