"""What the networks of both streams see in one video over time: scores of clips along it, and of all together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models import clip_scores, cuda
from models.folding import fold_batch_norm
from models.input_spec import InputSpec, Stream
from pipelines.clips.sampling import EvaluationProtocol, Flow, Frames, cut_test_frames, decoding_of, spread_clips
from pipelines.clips.tensors import scale_clips
from pipelines.datasets.records import describe_rate
from pipelines.errors import InputError
from pipelines.evaluation.raw_video import compute_flow, read_video
from pipelines.media.decode import DecodeSettings
from pipelines.training.trained_network import Network
from pipelines.tvl1.params import FlowPreset

MOST_CLIPS = 32  # of a video that are scored
CPU_LIMIT_S = 120  # of a processor, that decoding a video may take

Probabilities = npt.NDArray[np.float64]  # (clips, classes)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A part of the video that was scored, in seconds."""

    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A video, its flow, and what was seen in it; "joint" is both streams' logits added, where there are two."""

    frames: Frames  # (T, H, W, 3)
    fps: float
    flow: Flow  # (T - 1, H, W, 2), px
    clips: tuple[Clip, ...]
    over_time: Mapping[str, Probabilities]
    overall: Mapping[str, npt.NDArray[np.float64]]  # (classes,), of the mean logits
    cut: bool  # the video goes on after what was read

    @property
    def seconds(self) -> float:
        return len(self.frames) / self.fps


class Reader:
    """Networks that are ready to read videos one after the other; not for several threads at a time."""

    def __init__(
        self,
        networks: Mapping[Stream, Network],
        *,
        seconds: float,
        flow_preset: FlowPreset = "faithful",
        precision: str = "fp32",
        device: torch.device | None = None,
    ) -> None:
        """Take the networks by stream; of a video its first `seconds` are read.

        Raises InputError where the two networks want different frames or clips of different lengths.
        """
        self.device = device or torch.device("cpu")
        self.networks = networks
        self.flow_preset = flow_preset
        self.seconds = seconds
        self.spec = _common({stream: network.model.input_spec for stream, network in networks.items()})
        self.decoding = _common_decoding(networks.values())
        # Folded first: `place` knows the form for CUDA of a folded unit.
        self.models = {
            stream: cuda.place(fold_batch_norm(network.model, dtype=cuda.DTYPES[precision]), self.device)
            for stream, network in networks.items()
        }

    def read(self, path: str) -> Reading:
        """What is seen in a video file. Raises OSError and VideoError, as decoding does, and InputError."""
        # One frame more tells whether the video goes on.
        video = read_video(path, self.decoding, most=lambda fps: self._count_frames(fps) + 1)
        most = self._count_frames(video.fps)
        cut, frames = len(video.frames) > most, video.frames[:most]
        if len(frames) < 2:
            raise InputError("the video has one frame only: there is no motion in it")
        flow = compute_flow(frames, self.flow_preset)
        span = self.spec.train.span
        # Each part of a video is seen twice: by clips that begin half a clip after one another.
        count = min(MOST_CLIPS, max(1, round(2 * len(flow) / span) - 1))
        seen: dict[Stream, npt.NDArray] = {"rgb": frames, "flow": flow}
        logits: dict[str, Tensor] = {
            stream: self._score(stream, seen[stream][: len(flow)], count) for stream in self.networks
        }
        if len(logits) > 1:
            # Equal weight, as in the paper's evaluation.
            logits["joint"] = torch.stack(list(logits.values())).sum(dim=0)
        starts = spread_clips(len(flow), self.spec, count)
        return Reading(
            frames=frames,
            fps=video.fps,
            flow=flow,
            clips=tuple(
                Clip(start=start / video.fps, end=min(start + span, len(frames)) / video.fps) for start in starts
            ),
            over_time={name: rows.softmax(dim=1).numpy() for name, rows in logits.items()},
            overall={name: rows.mean(dim=0).softmax(dim=0).numpy() for name, rows in logits.items()},
            cut=cut,
        )

    def _count_frames(self, fps: float) -> int:
        """Frames of a video that are read, at this rate."""
        return max(2, round(self.seconds * fps))

    @torch.no_grad()
    def _score(self, stream: Stream, video: npt.NDArray, count: int) -> Tensor:
        """Logits (count, classes) float64 of clips spread over the video; one after the other, as they are large."""
        network, model = self.networks[stream], self.models[stream]
        protocol = EvaluationProtocol(num_clips=count)
        try:
            cut = cut_test_frames({stream: video}, network.model.input_spec, network.settings, protocol)[stream]
        except ValueError as error:
            raise InputError(str(error)) from error
        rows = []
        for clip in cut:
            scaled = scale_clips(stream, torch.from_numpy(clip[None]), network.settings.bound)
            rows.append(clip_scores(model(scaled.to(self.device)))[0].double().cpu())
        scores = torch.stack(rows)
        if not scores.isfinite().all():
            raise InputError(f"--{stream}: its scores are infinite or not a number: try --precision fp32")
        return scores


def _common_decoding(networks: Iterable[Network]) -> DecodeSettings:
    wanted = [decoding_of(network.model.input_spec, network.settings) for network in networks]
    if any(one.frame_size != wanted[0].frame_size or one.short_side != wanted[0].short_side for one in wanted):
        sizes = " and ".join(one.frame_size or str(one.short_side) for one in wanted)
        raise InputError(f"--rgb and --flow want frames of different sizes: {sizes} px")
    if any(one.fps != wanted[0].fps for one in wanted):
        rates = " and ".join(describe_rate(one.fps) for one in wanted)
        raise InputError(f"--rgb and --flow want frames of different rates: {rates}")
    return replace(wanted[0], cpu_limit_s=CPU_LIMIT_S)


def _common(specs: Mapping[Stream, InputSpec]) -> InputSpec:
    spans = {spec.train.span for spec in specs.values()}
    if len(spans) > 1:
        raise InputError(f"--rgb and --flow look at clips of different lengths: {' and '.join(map(str, spans))} frames")
    return next(iter(specs.values()))
