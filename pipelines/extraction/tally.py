"""How far an extraction is, as numbers. Apart from what asks for them, so that the actor that counts starts quickly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Videos finished since the run began, quarantined ones included. A repeated task counts its videos twice."""

    seconds: float
    videos: int
    frames: int
    quarantined: int
    nodes: Mapping[str, int] = field(default_factory=dict)  # id of each node that worked → videos it finished
    gpu_share: float | None = None  # of the time, that the flow actors computed; None: there are none


class VideoCounter:
    """Adds up what workers tell it of the videos that they finished."""

    def __init__(self) -> None:
        self.frames = self.quarantined = 0
        self.nodes: Counter[str] = Counter()

    def add(self, frames: int, quarantined: bool, node: str) -> None:
        """Count one video."""
        self.frames += frames
        self.quarantined += quarantined
        self.nodes[node] += 1

    def read(self) -> tuple[int, int, dict[str, int]]:
        """Frames, videos in quarantine, and videos finished by each node."""
        return self.frames, self.quarantined, dict(self.nodes)
