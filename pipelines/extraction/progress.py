"""How far a run is, counted where the work is done and shown where somebody looks.

Ray counts blocks, and a block here is a whole shard; people count videos. Workers tell one small actor of each video,
and a thread of the driver asks it every few seconds. The actor lives on the driver's node, so that it is lost with the
driver only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.extraction.tally import Tally, VideoCounter
from pipelines.ray_data import polled_actor


class Progress(Protocol):
    """Is told, by the worker, of every video that it finished."""

    def __call__(self, *, frames: int, quarantined: bool) -> None: ...


class ActorProgress:
    """Tells the counting actor of a video; travels to the workers."""

    def __init__(self, counter: Any) -> None:
        self.counter = counter

    def __call__(self, *, frames: int, quarantined: bool) -> None:
        # Not waited for: a count that is lost costs a line of progress, and no video.
        self.counter.add.remote(frames, quarantined, ray.get_runtime_context().get_node_id())


@contextmanager
def watch_progress(
    on_tally: Callable[[Tally], None], *, every_s: float, busy_seconds: Callable[[], list[float]] | None = None
) -> Iterator[ActorProgress]:
    """Count videos in an actor and hand the tally to `on_tally` every few seconds and once at the end.

    busy_seconds: how long each flow actor has computed so far.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    started = time.monotonic()

    def tell(counter: Any) -> None:
        frames, quarantined, nodes = ray.get(counter.read.remote(), timeout=30)
        busy = busy_seconds() if busy_seconds else None
        seconds, videos = time.monotonic() - started, sum(nodes.values())
        share = _share(busy, seconds)
        on_tally(
            Tally(seconds=seconds, videos=videos, frames=frames, quarantined=quarantined, nodes=nodes, gpu_share=share)
        )

    with polled_actor(VideoCounter, tell, every_s=every_s, scheduling_strategy=here) as counter:
        yield ActorProgress(counter)


def _share(busy: list[float] | None, seconds: float) -> float | None:
    """Mean share of the time that the actors computed; those that share a GPU wait for each other's part, too."""
    if busy is None:
        return None
    return min(1.0, sum(busy) / (max(1, len(busy)) * seconds))
