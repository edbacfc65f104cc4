"""How far a run is, counted where the work is done and shown where somebody looks.

Ray counts blocks, and a block here is a whole shard; people count videos. Workers tell one small actor of each video,
and a thread of the driver asks it every few seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import ray


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Videos finished since the run began, quarantined ones included. A repeated task counts its videos twice."""

    seconds: float
    videos: int
    frames: int
    quarantined: int


class Progress(Protocol):
    """Is told, by the worker, of every video that it finished."""

    def __call__(self, *, frames: int, quarantined: bool) -> None: ...


class _Counter:
    def __init__(self) -> None:
        self.videos = self.frames = self.quarantined = 0

    def add(self, frames: int, quarantined: bool) -> None:
        self.videos += 1
        self.frames += frames
        self.quarantined += quarantined

    def read(self) -> tuple[int, int, int]:
        return self.videos, self.frames, self.quarantined


class ActorProgress:
    """Tells the counting actor of a video; travels to the workers."""

    def __init__(self, counter: Any) -> None:
        self.counter = counter

    def __call__(self, *, frames: int, quarantined: bool) -> None:
        self.counter.add.remote(frames, quarantined)


@contextmanager
def watch_progress(on_tally: Callable[[Tally], None], *, every_s: float) -> Iterator[ActorProgress]:
    """Count videos in an actor and hand the tally to `on_tally` every few seconds and once at the end."""
    counter = ray.remote(num_cpus=0, max_restarts=-1)(_Counter).remote()
    started, stop = time.monotonic(), threading.Event()

    def tell() -> None:
        videos, frames, quarantined = ray.get(counter.read.remote(), timeout=30)
        seconds = time.monotonic() - started
        on_tally(Tally(seconds=seconds, videos=videos, frames=frames, quarantined=quarantined))

    def poll() -> None:
        while not stop.wait(every_s):
            try:
                tell()
            except ray.exceptions.RayError:  # the actor's node is gone or slow: the run matters, not its count
                continue

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield ActorProgress(counter)
        tell()
    finally:
        stop.set()
        thread.join(timeout=every_s)
        ray.kill(counter)
