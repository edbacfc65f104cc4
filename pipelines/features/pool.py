"""The GPUs of a run as one place that takes the frames of a video and gives back its features.

A task sends one batch while it decodes the next, so an actor has work of as many videos as there are CPUs, and what is
on its way is bounded, whatever the length of a video. An actor that dies, or whose node does, comes back by itself, and
the task begins its video again, on it or on another; a video that does so time after time ends the run.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from pipelines.extraction import flow_pool
from pipelines.extraction.batches import BATCH_PIXELS
from pipelines.extraction.flow_pool import ActorPool, FlowLostError, receive
from pipelines.extraction.tasks import Placement
from pipelines.features.actor import FeatureActor, SessionLostError, Source
from pipelines.features.spool import Spool
from pipelines.features.task import FeatureTask

MOST_FRAMES = 64  # of a batch
Batch = tuple[Source, npt.NDArray[Any]]


class FeaturePool(ActorPool):
    """Actors that compute features."""

    def compute(self, open_batches: Callable[[], Iterator[Batch]]) -> tuple[Spool, str]:
        """The features of the video that `open_batches` reads, from its start each time, and what computed them.

        Raises what an actor raised, and FlowLostError where actors died time after time, or are gone.
        """
        for deaths in itertools.count(1):
            actor = self.pick()
            try:
                return self._send_all(actor, open_batches())
            except (ray.exceptions.ActorUnavailableError, SessionLostError) as error:
                if deaths > flow_pool.MAX_DEATHS:
                    raise FlowLostError(f"{deaths} GPU actors died while they had the same video: {error}") from error
            self.pass_over(actor)
        raise AssertionError("counts for ever")

    def _send_all(self, actor: Any, batches: Iterable[Batch]) -> tuple[Spool, str]:
        self._turn += 1
        spool = Spool()
        key = f"{ray.get_runtime_context().get_node_id()} {os.getpid()} {self._turn}"
        number, answer = 0, None
        try:
            for source, frames in batches:
                if answer is not None:
                    spool.add(receive(answer))
                answer = actor.push.options(max_task_retries=0).remote(key, number, source, frames)
                number += 1
            if answer is not None:
                spool.add(receive(answer))
            features, kernel = receive(actor.finish.options(max_task_retries=0).remote(key, number))
            spool.add(features)
            return spool, kernel
        except Exception:
            # Else the actor would hold the windows of each video that fails on the way, for an hour.
            if answer is not None:
                ray.wait([answer])  # a batch that comes later than this would begin the session again
            actor.drop.options(max_task_retries=0).remote(key)
            raise


def iter_batches(frames: Iterable[npt.NDArray[np.uint8]]) -> Iterator[npt.NDArray[np.uint8]]:
    """Frames (H, W, 3) in batches (n, H, W, 3) of bounded size."""
    batch: list[npt.NDArray[np.uint8]] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) >= max(1, min(MOST_FRAMES, BATCH_PIXELS // frame.size)):
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def start_pool(task: FeatureTask, backend: str, placement: Placement) -> AbstractContextManager[FeaturePool | None]:
    """The actors of a placement, which come up while the caller does other things; None where it has none."""
    return _open(task, backend, placement) if placement.flow_actors else nullcontext(None)


@contextmanager
def _open(task: FeatureTask, backend: str, placement: Placement) -> Iterator[FeaturePool]:
    with flow_pool.start_actors(
        FeatureActor,
        (task, backend),
        num_actors=placement.flow_actors,
        gpus_per_actor=placement.gpus_per_actor,
    ) as actors:
        yield FeaturePool(actors)
