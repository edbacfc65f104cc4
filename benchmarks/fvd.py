"""Does the Fréchet video distance grow with distortion? Two halves of real videos, one ever noisier or blurrier.

    python benchmarks/fvd.py --videos DIR

The network has random weights, so the numbers mean nothing beside each other's order: this holds the clips, the
preparation and the distance to what any embedding must give. With --weights it is what that network sees.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
import tyro

import models
from models import checkpoint
from models.checkpoint import Metadata
from pipelines.evaluation.frechet import FeatureStatistics, describe_features, frechet_distance
from pipelines.evaluation.fvd import Clips, Embedder, Embedding, find_videos
from pipelines.evaluation.fvd_clips import DIALECTS, ClipChoice

NOISE = (0, 4, 8, 16, 32, 64)  # standard deviation, of 255
BLUR = (0, 1, 2, 4, 8)  # standard deviation, px


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Distances between two halves of a folder's videos."""

    videos: str
    """Folder of videos."""
    weights: str | None = None
    """I3D of the RGB stream. None: one of width 1/8 with random weights."""
    clips: ClipChoice = field(default_factory=ClipChoice)


def main(config: Benchmark) -> None:
    """Embed both halves, distort one, print a table for each dialect."""
    torch.set_num_threads(1)
    videos, _ = find_videos(config.videos)
    order = np.random.default_rng(config.clips.seed).permutation(len(videos)).tolist()
    halves = [[videos.read(place, config.clips) for place in order[half::2]] for half in (0, 1)]
    print(f"{len(videos)} videos in two halves, {sum(map(len, halves[0]))} and {sum(map(len, halves[1]))} clips")
    with tempfile.TemporaryDirectory() as folder:
        weights = config.weights or draw_network(folder)
        for dialect in DIALECTS:
            embedder = (
                Embedding(weights=weights, dialect=dialect, choice=config.clips).load().place(torch.device("cpu"))
            )
            real = embed(embedder, halves[0])
            for name, levels, distort in (("noise", NOISE, add_noise), ("blur", BLUR, blur)):
                distances = [
                    frechet_distance(real, embed(embedder, [distort(clips, level) for clips in halves[1]]))
                    for level in levels
                ]
                rises = all(before < after for before, after in itertools.pairwise(distances))
                row = "  ".join(f"{level:g}: {found:.4g}" for level, found in zip(levels, distances, strict=True))
                print(f"{dialect:11} {name:6} {row}  {'rises' if rises else 'DOES NOT RISE'}", flush=True)


def embed(embedder: Embedder, clips: Sequence[Clips]) -> FeatureStatistics:
    """The statistics of the clips of some videos."""
    return describe_features(np.concatenate([embedder(part) for part in clips]), unbiased=embedder.dialect.unbiased)


@torch.no_grad()
def draw_network(folder: str) -> str:
    """A checkpoint of an I3D whose weights are random and whose batch norm fits noise."""
    torch.manual_seed(0)
    model = models.build("i3d", num_classes=400, stream="rgb", width=0.125, frames=16, bn_momentum=1.0)
    model(torch.randn(2, 3, 16, 224, 224) / 2)
    checkpoint.save(Path(folder), model, Metadata(classes=tuple(map(str, range(400)))))
    return folder


def add_noise(clips: Clips, level: float) -> Clips:
    """Normal noise on every value."""
    noise = np.random.default_rng(0).normal(0, level, clips.shape) if level else 0
    return np.clip(np.rint(clips + noise), 0, 255).astype(np.uint8)


def blur(clips: Clips, level: float) -> Clips:
    """Every frame under a Gaussian."""
    soften: Callable[[npt.NDArray[np.uint8]], npt.NDArray] = lambda frame: cv2.GaussianBlur(frame, (0, 0), level)  # noqa: E731
    return np.stack([np.stack([soften(frame) for frame in clip]) for clip in clips]) if level else clips


if __name__ == "__main__":
    main(tyro.cli(Benchmark, description=__doc__))
