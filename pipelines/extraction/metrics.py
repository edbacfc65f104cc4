"""What extractions tell Prometheus: counters that Ray's agent on each node offers at the node's metrics port.

Ray puts `ray_` before each name and `_total` after it. A task that is repeated counts its videos again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeVar, get_args

from ray.util.metrics import Counter

Step = Literal["fetch", "decode", "flow", "encode", "features", "commit"]
STEPS: tuple[Step, ...] = get_args(Step)
# Name → what it counts, and the labels that it has.
COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "extraction_videos": ("Videos that were finished, quarantined ones included.", ()),
    "extraction_frames": ("RGB frames of these videos.", ()),
    "extraction_quarantined": ("Videos that yield no usable frames, by the kind of error.", ("kind",)),
    "extraction_seconds": ("Seconds of all workers, by what they were spent on.", ("step",)),
}
T = TypeVar("T")


class Stopwatch:
    """Seconds by step. Steps that pull one another's results each count only their own part."""

    def __init__(self) -> None:
        self.seconds: dict[Step, float] = dict.fromkeys(STEPS, 0.0)
        self.elsewhere = 0.0  # seconds within steps that count for none

    @contextmanager
    def of(self, step: Step) -> Iterator[None]:
        """Count the time of the block for a step, less what steps within it count for themselves."""
        started, counted = time.perf_counter(), self._counted()
        try:
            yield
        finally:
            within = self._counted() - counted
            self.seconds[step] += time.perf_counter() - started - within

    def _counted(self) -> float:
        return sum(self.seconds.values()) + self.elsewhere

    def through(self, step: Step, items: Iterable[T]) -> Iterator[T]:
        """The items, with the time that each takes to come counted for a step."""
        iterator = iter(items)
        while True:
            with self.of(step):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def without(self, items: Iterable[T]) -> Iterator[T]:
        """The items, whose making counts for no step: it has a stopwatch of its own."""
        iterator = iter(items)
        while True:
            started = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.elsewhere += time.perf_counter() - started
            yield item


def count_video(*, frames: int, error_kind: str | None) -> None:
    """Count a finished video, by the worker that finished it; `error_kind` where it is quarantined."""
    _count("extraction_videos", 1)
    _count("extraction_frames", frames)
    if error_kind is not None:
        _count("extraction_quarantined", 1, kind=error_kind)


def count_seconds(seconds: Mapping[Step, float]) -> None:
    """Count what a worker spent on each step."""
    for step, spent in seconds.items():
        _count("extraction_seconds", spent, step=step)


def _count(name: str, value: float, **labels: str) -> None:
    if value > 0:  # which is all that Ray's counters take
        description, keys = COUNTERS[name]
        Counter(name, description=description, tag_keys=keys).inc(value, tags=labels)
