"""What a model asks of the data, and what every model's settings share.

An input spec is data: a loader cuts training clips and an evaluator cuts test clips from it without knowing the model,
nor torch, which takes a process that decodes two seconds to import.
Clips are (B, C, T, H, W) float tensors, RGB in [-1, 1], flow clipped to ±20 px and scaled to [-1, 1], u before v.
A model takes a mapping from stream name to clip, or the clip alone where it has one stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

Stream = Literal["rgb", "flow"]

STREAMS: tuple[Stream, ...] = get_args(Stream)
CHANNELS: dict[str, int] = {"rgb": 3, "flow": 2}
FRAMES_PER_SECOND = 25


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Settings that every model has; each model's own config adds its own.

    `size` is the side of the square crop in pixels. `width` scales the channels of every layer but the classes.
    `bn_momentum` is PyTorch's: the share of a new batch in the running statistics. 0.001 is the paper's; runs of a few
    hundred steps need about 0.1, or the running statistics never leave their initial values.
    """

    num_classes: int
    width: float = 1.0
    size: int = 224
    dropout: float = 0.5
    bn_momentum: float = 0.001

    def __post_init__(self) -> None:
        # Types are strings here, by `from __future__ import annotations`.
        for counted in (f.name for f in fields(self) if f.type == "int"):
            value = getattr(self, counted)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{counted} is {value!r}; give a whole number, at least 1.")
        if self.width <= 0:
            raise ValueError(f"width is {self.width}; give a positive factor, 1.0 for the paper's channels.")
        if self.size < 32:
            raise ValueError(f"size is {self.size}; the networks reduce 32-fold, give at least 32 pixels.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; give a probability in [0, 1).")


@dataclass(frozen=True, kw_only=True)
class StreamSampling:
    """The frames of one stream in one clip: `num_frames` of `channels` each, every `frame_step`-th frame."""

    channels: int
    num_frames: int
    frame_step: int = 1

    def frame_indices(self, first: int) -> list[int]:
        """The frames of a clip that begins at frame `first`; indices past the video's end mean a looped video."""
        return [first + i * self.frame_step for i in range(self.num_frames)]


@dataclass(frozen=True, kw_only=True)
class ClipSampling:
    """How clips are cut from a 25 fps video: `num_clips` of them, each covering `span` consecutive frames.

    For training the first frame is random among those that leave enough frames, and num_clips is 1. For testing the
    clips follow one another without overlap from frame 0 on, and the video's scores are the mean over them. With
    `any_length` the model takes a shorter video whole, down to the span of a training clip; else it is looped.
    """

    span: int
    streams: Mapping[str, StreamSampling]
    num_clips: int = 1
    any_length: bool = False

    @property
    def seconds(self) -> float:
        """The temporal footprint: Table 1's column, in seconds."""
        return self.num_clips * self.span / FRAMES_PER_SECOND


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """Everything that a loader and an evaluator must know about a model's input and output.

    `size` is the crop's side: random for training, central for testing, from frames whose shorter side is
    `shorter_side`. With `scores_every_step` the model gives (B, T, num_classes) logits: the loss is taken at all time
    steps, a clip's score is the last one's (`models.clip_scores`, `models.cross_entropies`). Otherwise
    (B, num_classes).
    """

    size: int
    train: ClipSampling
    test: ClipSampling
    scores_every_step: bool = False

    @property
    def shorter_side(self) -> int:
        """The shorter side that frames are resized to before the crop, in the paper's ratio of 256 to 224."""
        return round(self.size * 256 / 224)


def consecutive_frames(
    stream: str, num_frames: int, *, num_clips: int = 1, frame_step: int = 1, any_length: bool = False
) -> ClipSampling:
    """Clips of one stream, each of `num_frames` frames taken every `frame_step`."""
    sampling = StreamSampling(channels=CHANNELS[stream], num_frames=num_frames, frame_step=frame_step)
    streams = {stream: sampling}
    return ClipSampling(span=num_frames * frame_step, streams=streams, num_clips=num_clips, any_length=any_length)
