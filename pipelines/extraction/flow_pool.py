"""The GPUs of a run as one place that takes grey frames and gives back codes of flow.

The tasks that decode and encode send batches to the actors and go on decoding while they wait, so an actor has work of
as many videos as there are CPUs. What is on its way is bounded, whatever the length and size of a video: each task has
at most IN_FLIGHT + 1 batches of at most BATCH_PIXELS in the object store (a frame of 4K is a batch by itself).

An actor that dies, or whose node does, comes back by itself, and the tasks send the batches that it had anew, to it or
to another. Ray's own retries would not do: they are used up while it has not noticed yet that a node is gone.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from pipelines.errors import BackendError
from pipelines.extraction.batches import BATCH_PIXELS, iter_batches
from pipelines.extraction.flow_actor import THREADS, FlowActor, FlowBatch, FlowTask, GreyFrames

IN_FLIGHT = 2  # batches of a video that are with an actor while the next is decoded
MAX_DEATHS = 3  # of actors that have a batch: one more, and it is the batch


class FlowLostError(BackendError):
    """No actor could compute a batch: not the fault of a video, so the run ends, and goes on where it stopped later."""


class OtherGPUsError(FlowLostError):
    """There are GPUs, but none of the kind that the data set is made on."""


class ActorPool:
    """Actors that compute on GPUs; travels to the workers, which talk to those of their own node first."""

    def __init__(self, actors: list[Any], wanted: str | None = None) -> None:
        self.actors = actors
        self.wanted = wanted  # the kernel that is computed by: actors that have another get no work
        self._asked: dict[Any, Any] = {}  # reference to an answer that has not come → its actor
        self._nodes: dict[Any, tuple[str, str]] = {}  # actor that has answered → its kernel and its node
        self._turn = os.getpid()  # workers begin with different actors

    def __reduce__(self) -> tuple[Any, ...]:
        # What is asked, and who has answered, is of this process only.
        return type(self), (self.actors, self.wanted)

    def kernel(self, planned: str | None = None) -> str:
        """What computes from now on: `planned` where an actor has it, else what the first that is up has.

        A cluster may have GPUs of several kinds. Raises FlowLostError where no actor can start.
        """
        if self.wanted is None:
            self.wanted = planned
            try:
                self._listen()
            except OtherGPUsError:
                self.wanted = None
                self._listen()
            self.wanted = next(iter(self._nodes.values()))[0]
            self._nodes = {actor: about for actor, about in self._nodes.items() if about[0] == self.wanted}
        return self.wanted

    def busy_seconds(self, timeout_s: float = 5.0) -> list[float]:
        """Seconds that each actor computed so far, of those that answer in time."""
        self._listen(timeout_s=timeout_s)
        requests = [actor.busy.remote() for actor in self._nodes]
        answered, _ = ray.wait(requests, num_returns=len(requests), timeout=timeout_s) if requests else ([], [])
        return [ray.get(reference) for reference in answered]

    def pick(self) -> Any:
        """An actor that is up, of this node where one is; waits for one."""
        self._listen()
        here = ray.get_runtime_context().get_node_id()
        near = [actor for actor, (_, node) in self._nodes.items() if node == here] or list(self._nodes)
        self._turn += 1
        return near[self._turn % len(near)]

    def pass_over(self, actor: Any) -> None:
        """Pick an actor that did not answer no more until it does."""
        self._nodes.pop(actor, None)
        if actor not in self._asked.values():
            self._asked[actor.about.remote()] = actor  # answers when it is back

    def _listen(self, timeout_s: float | None = None) -> None:
        """Learn which actors are up; waits, for ever or so long, until one is."""
        if not self._asked and not self._nodes:
            self._asked = {actor.about.remote(): actor for actor in self.actors}
        while self._asked:
            ready, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)
            if not ready and not self._nodes:
                ready, _ = ray.wait(list(self._asked), num_returns=1, timeout=timeout_s)
            for reference in ready:
                actor, about = self._asked.pop(reference), receive(reference)
                if self.wanted in (None, about[0]):
                    self._nodes[actor] = about
            if self._nodes or not ready:
                return
        if not self._nodes:
            raise OtherGPUsError(f"no flow actor computes by {self.wanted}, as the data set is made: add such GPUs")


class FlowPool(ActorPool):
    """Actors that compute flow."""

    def __init__(self, actors: list[Any], batch_pixels: int = BATCH_PIXELS, wanted: str | None = None) -> None:
        super().__init__(actors, wanted)
        self.batch_pixels = batch_pixels

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.actors, self.batch_pixels, self.wanted)

    def stream(self, frames: Iterable[GreyFrames], num_samples: int) -> Iterator[FlowBatch]:
        """Flow of each frame (H, W) uint8 to the next in batches, in order, the first samples also as floats.

        Raises what a solve raised, and FlowLostError where the actors are gone.
        """
        # In order: an encoder takes frames one after another, whichever batch is done first.
        waiting: deque[_Sent] = deque()
        for batch in iter_batches(frames, self.batch_pixels):
            waiting.append(self._send(batch, num_samples))
            num_samples = max(0, num_samples - len(batch) + 1)
            if len(waiting) > IN_FLIGHT:
                yield self._receive(waiting.popleft())
        while waiting:
            yield self._receive(waiting.popleft())

    def _send(self, batch: GreyFrames, num_samples: int) -> _Sent:
        actor = self.pick()
        return _Sent(batch, num_samples, actor, actor.solve.options(max_task_retries=0).remote(batch, num_samples))

    def _receive(self, sent: _Sent) -> FlowBatch:
        for deaths in itertools.count(1):
            try:
                return receive(sent.answer)
            except ray.exceptions.ActorUnavailableError as error:
                if deaths > MAX_DEATHS:
                    raise FlowLostError(f"{deaths} flow actors died while they had the same batch: {error}") from error
            self.pass_over(sent.actor)
            sent = self._send(sent.batch, sent.num_samples)
        raise AssertionError("counts for ever")


@dataclass(frozen=True)
class _Sent:
    """A batch on its way."""

    batch: GreyFrames
    num_samples: int
    actor: Any
    answer: Any


def receive(reference: Any) -> Any:
    """The value of a reference, or the error that the actor raised; FlowLostError where the actor is gone for good."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from error
    except ray.exceptions.ActorDiedError as error:
        raise FlowLostError(f"a flow actor died and cannot come back: {error}") from error


@contextmanager
def open_pool(task: FlowTask, *, num_actors: int, gpus_per_actor: float) -> Iterator[FlowPool]:
    """Actors that come up in the background; gone at the end."""
    with start_actors(FlowActor, task, num_actors=num_actors, gpus_per_actor=gpus_per_actor) as actors:
        yield FlowPool(actors)


@contextmanager
def start_actors(kind: type, task: Any, *, num_actors: int, gpus_per_actor: float) -> Iterator[list[Any]]:
    """Actors `kind(task)` that come up in the background; gone at the end."""
    # The arguments are few bytes, so that they travel with the actor: from the object store a restart would miss them.
    remote = ray.remote(**actor_options(gpus_per_actor))(kind)
    actors = [remote.remote(task) for _ in range(num_actors)]
    for actor in actors:
        actor.prewarm.remote()
    try:
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)


def actor_options(gpus_per_actor: float) -> dict[str, float]:
    """What an actor asks of Ray: its share of a GPU and no CPU, so that it also runs where all CPUs are taken."""
    return {
        "num_cpus": 0,
        "num_gpus": gpus_per_actor,
        "max_concurrency": THREADS,
        "max_restarts": -1,
        "max_task_retries": -1,  # of a question; batches are sent anew here
    }
