"""The worker that holds a GPU: flow and networks of several videos at a time, each of which comes in batches of frames.

What it knows of a video, a session, is lost with it: its task then begins that video again (pool.py).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import torch

from models.input_spec import Stream
from pipelines.errors import BackendError, UserError
from pipelines.extraction.flow_actor import DeviceFlow, FlowTask, HostFlow, is_fatal
from pipelines.features.compute import FeatureNetworks
from pipelines.features.task import Features, FeatureTask, VideoFeatures, find_kernel

IDLE_S = 3600.0  # after which the task of a session is taken to have died; a decoder is given up long before

logger = logging.getLogger(__name__)

Source = Literal["video", "rgb", "flow"]  # frames whose flow is to be computed, too, or one stream as it is


class SessionLostError(Exception):
    """The actor knows nothing of this video, or not all that was sent of it: it has died meanwhile."""


@dataclass
class _Session:
    """One video on its way."""

    video: VideoFeatures
    number: int = 0  # of the next batch
    last: npt.NDArray[np.uint8] | None = None  # (1, H, W) grey, of the batch before
    touched: float = 0.0


class FeatureActor:
    """Takes batches from several threads, those of a session one after the other; dies where its GPU has failed."""

    def __init__(self, work: tuple[FeatureTask, str]) -> None:
        self.task, backend = work
        self.kernel = find_kernel(backend, computes_flow=self.task.computes_flow)
        self.device = torch.device("cuda" if backend == "torch" and torch.cuda.is_available() else "cpu")
        self.sessions: dict[str, _Session] = {}
        self.lock = threading.Lock()  # of the networks: several batches at once would need the memory of as many
        self.books = threading.Lock()  # of sessions and times
        self.active, self.since, self.seconds = 0, 0.0, 0.0
        self.refusal: UserError | None = None
        self.networks: FeatureNetworks | None = None
        self.flow: DeviceFlow | HostFlow | None = None
        try:
            self.networks = self.task.load(self.device)
        except UserError as error:
            self.refusal = error  # raised here it would be buried in Ray's account of the actor's death
        if self.task.computes_flow:
            flow = FlowTask(backend=backend, preset=self.task.flow_preset, scale=self.task.scale)
            self.flow = DeviceFlow(flow) if backend == "torch" else HostFlow(flow)

    def about(self) -> tuple[str, str]:
        """The kernel, and the node that the actor runs on. Raises what its networks were refused for."""
        import ray

        if self.refusal is not None:
            raise self.refusal
        return self.kernel, ray.get_runtime_context().get_node_id()

    def prewarm(self) -> None:
        """Compile the kernels, or load them from this node's cache, before the first video is decoded."""
        if self.flow is not None:
            self.flow.prewarm()

    def busy(self) -> float:
        """Seconds in which a batch was computed on."""
        with self.books:
            return self.seconds + (time.perf_counter() - self.since if self.active else 0.0)

    def push(self, key: str, number: int, source: Source, frames: npt.NDArray[Any]) -> Features:
        """The next batch of a session: `number` 0 begins it. RGB (n, H, W, 3), or codes of flow (n, 2H, W).

        Returns the features of the windows that are complete since the batch before. Raises SessionLostError where the
        batches before are not there, and VideoError.
        """
        with self._work():
            session = self._find(key, number)
            if source == "video":
                self._push_video(session, frames)
            else:
                self._push(session, source, frames)
            session.number = number + 1
            with self.lock:
                return session.video.take()

    def finish(self, key: str, number: int) -> tuple[Features, str]:
        """The last features of a video of so many batches, and the kernel that made them."""
        with self._work():
            session = self._find(key, number)
            self.drop(key)
            with self.lock:
                return session.video.finish(), self.kernel

    def drop(self, key: str) -> None:
        """Forget a session: its video failed, so that nobody will finish it."""
        with self.books:
            self.sessions.pop(key, None)

    def _find(self, key: str, number: int) -> _Session:
        now = time.monotonic()
        with self.books:
            if number == 0:
                for old in [other for other, session in self.sessions.items() if now - session.touched > IDLE_S]:
                    del self.sessions[old]
                assert self.networks is not None, "about() refuses before"
                self.sessions[key] = _Session(video=VideoFeatures(self.networks, self.task.scales))
            session = self.sessions.get(key)
            if session is None or session.number != number:
                raise SessionLostError(f"batch {number} comes first")
            session.touched = now
        return session

    def _push_video(self, session: _Session, frames: npt.NDArray[np.uint8]) -> None:
        if "rgb" in session.video.streams:
            self._push(session, "rgb", frames)
        if self.flow is None:
            return
        grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])
        pairs = grey if session.last is None else np.concatenate([session.last, grey])
        session.last = grey[-1:]
        if len(pairs) > 1:
            levels, _, _ = self.flow.solve(pairs, 0)
            self._push(session, "flow", levels)

    def _push(self, session: _Session, stream: Stream, frames: npt.NDArray[Any]) -> None:
        with self.lock:
            for frame in frames:
                session.video.push(stream, frame)

    @contextmanager
    def _work(self) -> Iterator[None]:
        """Count the time, and die where the GPU has failed: it fails every later call of this process, too."""
        cv2.setNumThreads(1)
        with self.books:
            self.since = self.since if self.active else time.perf_counter()
            self.active += 1
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"the memory of a GPU ran out: give fewer --num-cpus, as each sends a video at a time ({error})"
            ) from error
        except Exception as error:
            if is_fatal(error):
                logger.exception("the GPU has failed; the actor starts anew")
                os._exit(1)
            raise
        finally:
            with self.books:
                self.active -= 1
                if not self.active:
                    self.seconds += time.perf_counter() - self.since
