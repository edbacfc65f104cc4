"""Why a video yields no usable frames: stable words for tables, a sentence for people; and what is no video's fault."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal[
    "bad_shape",
    "corrupt",
    "decoder_crashed",
    "decoder_hung",
    "empty_span",
    "encrypted",
    "no_frames",
    "no_video_stream",
    "out_of_memory",
    "too_long",
    "too_slow",
    "truncated",
    "unreadable",
]
KINDS: tuple[str, ...] = get_args(Kind)


class VideoError(Exception):
    """A video that yields no usable frames; `kind` is a stable word for tables, `message` a sentence for people."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(kind, message)
        self.kind: Kind = kind
        self.message = message

    def __str__(self) -> str:
        return self.message


class BackendError(RuntimeError):
    """A flow backend is asked for where what it needs is not there; the message says what to do."""
