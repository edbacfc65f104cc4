"""Which videos of a data set a person should see, as small looping videos: RGB beside flow in the Middlebury colours.

Hue is the direction of motion and saturation its length (Baker et al., "A Database and Evaluation Methodology for
Optical Flow", IJCV 2011, whose colour wheel this is); white is no motion.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import av
import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.datasets import shards
from pipelines.datasets.shards import Row
from pipelines.errors import DataError
from pipelines.media.codec import CodecSettings, RGBEncoder, decode_flow, decode_rgb

logger = logging.getLogger(__name__)

NUM_PREVIEWS = 12
SECONDS = 2.0
MOST_FRAMES = 120  # of a video at a high rate
SHORT_SIDE, LONG_SIDE = 144, 256  # px of one of the two halves, at most
FULL_COLOUR_PX = (0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
_ENCODING = CodecSettings(rgb_codec="h264", rgb_quality=30, keyframe_interval=64)
# Hues from one corner of the wheel to the next: red, yellow, green, cyan, blue, magenta, red.
_ARCS = (15, 6, 4, 11, 13, 6)
_CORNERS = ((255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255), (255, 0, 0))

Flow = npt.NDArray[np.float32]
Image = npt.NDArray[np.uint8]


class PreviewError(ValueError):
    """A row's blobs cannot be shown; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A short mp4 (H.264, yuv420p), RGB left and flow right, and how it is to be read."""

    data: bytes
    height: int  # px, of the mp4
    width: int
    seconds: float
    full_colour_px: float  # px of motion a frame that is shown at full saturation


@dataclass(frozen=True, kw_only=True)
class Card:
    """One video to show: its row of videos.parquet, why it was chosen, and the preview or why there is none."""

    video: Row
    reason: str
    preview: Preview | PreviewError


@functools.cache
def _wheel() -> npt.NDArray[np.float32]:
    """The 55 colours of the wheel, (55, 3) in 0 to 1, in order of angle."""
    arcs = [
        np.linspace(first, last, count, endpoint=False)
        for first, last, count in zip(_CORNERS, _CORNERS[1:], _ARCS, strict=False)
    ]
    return (np.concatenate(arcs) / 255).astype(np.float32)


def colour_flow(flow: Flow, full_colour_px: float) -> Image:
    """Flow (..., 2) in px as RGB (..., 3) uint8; beyond `full_colour_px` colours get darker instead of paler."""
    wheel = _wheel()
    u, v = flow[..., 0], flow[..., 1]
    radius = np.hypot(u, v) / np.float32(full_colour_px)
    # Both negated as in Baker et al.'s own code, so that the colours are those that readers know.
    position = (np.arctan2(-v, -u) / np.pi + 1) / 2 * (len(wheel) - 1)
    low = position.astype(np.int32)
    weight = (position - low)[..., None]
    hue = (1 - weight) * wheel[low] + weight * wheel[(low + 1) % len(wheel)]
    colour = np.where(radius[..., None] <= 1, 1 - radius[..., None] * (1 - hue), hue * 0.75)
    return np.asarray(np.rint(255 * colour), np.uint8)


def draw_wheel(size: int) -> bytes:
    """The legend as PNG, (size, size) px with a transparent outside: each point's colour is that of its own vector."""
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    flow = np.stack(np.meshgrid(axis, axis), axis=-1)
    radius = np.hypot(flow[..., 0], flow[..., 1])
    alpha = np.clip((1 - radius) * size / 2, 0, 1) * 255
    # A hair within the circle: beyond it colours turn dark, and the rim would be ragged.
    flow /= np.maximum(radius, 1)[..., None] * np.float32(1.0001)
    image = np.dstack([colour_flow(flow, 1)[..., ::-1], alpha.astype(np.uint8)])
    return cv2.imencode(".png", image)[1].tobytes()


def make_preview(row: Row) -> Preview:
    """About two seconds from the middle of a shard's row; PreviewError where there is no flow or it cannot be read."""
    num_frames = min(row["num_frames"] - 1, math.ceil(SECONDS * row["fps"]), MOST_FRAMES)
    if num_frames < 1:
        raise PreviewError("a video of one frame has no flow to show")
    start = (row["num_frames"] - 1 - num_frames) // 2
    try:
        rgb = decode_rgb(row["rgb"], start=start, stop=start + num_frames)
        flow = decode_flow(row["flow"], row["convention"].flow, start=start, stop=start + num_frames)
        return encode_preview(rgb, flow, row["fps"])
    except (ValueError, OSError, av.error.FFmpegError) as error:
        raise PreviewError(f"frames {start} to {start + num_frames} cannot be shown: {error}") from error


def encode_preview(rgb: Image, flow: Flow, fps: float) -> Preview:
    """Frames (T, H, W, 3) uint8 and their flow (T, H, W, 2) in px side by side."""
    full_colour_px = _choose_full_colour(flow)
    height, width = _fit(*rgb.shape[1:3])
    encoder = RGBEncoder(_ENCODING, height=height, width=2 * width, fps=fps)
    for frame, field in zip(rgb, flow, strict=True):
        halves = [
            cv2.resize(half, (width, height), interpolation=cv2.INTER_AREA)
            for half in (frame, colour_flow(field, full_colour_px))
        ]
        encoder.write(np.asarray(np.hstack(halves), np.uint8))
    return Preview(
        data=encoder.close(),
        height=height,
        width=2 * width,
        seconds=len(rgb) / fps,
        full_colour_px=full_colour_px,
    )


def _choose_full_colour(flow: Flow) -> float:
    """The round number of px that 97% of the vectors stay below."""
    # Not the largest: a single wrong vector would make all others pale.
    reached = float(np.quantile(np.hypot(flow[..., 0], flow[..., 1]), 0.97))
    return next((px for px in FULL_COLOUR_PX if px >= reached), FULL_COLOUR_PX[-1])


def _fit(height: int, width: int) -> tuple[int, int]:
    """The even size, at most the frame's, that keeps its shape within the sides allowed."""
    scale = min(1.0, SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
    # yuv420p halves both sides.
    return tuple(max(2, 2 * round(side * scale / 2)) for side in (height, width))  # type: ignore[return-value]


def choose_videos(videos: pa.Table, *, still_px: float, clipped_share: float) -> list[tuple[Row, str]]:
    """Up to NUM_PREVIEWS usable videos that have flow, each with why: the oddest two, then ("") a spread over classes.

    `videos` is videos.parquet; odd is a mean |flow| below `still_px` or a share of clipped flow above `clipped_share`.
    Equal tables give the same choice.
    """
    table = videos.filter(pc.and_(pc.equal(videos["status"], "ok"), pc.greater(videos["num_frames"], 1)))
    chosen: dict[int, str] = {}
    for column, sign, limit, why in (
        ("flow_clipped", 1, clipped_share, "most clipped"),
        ("flow_mean", -1, -still_px, "stillest"),
    ):
        values = sign * np.asarray(table[column].to_numpy())
        if len(values) and values.max() > limit:
            # A video may be the oddest in both ways, and is shown once.
            chosen.setdefault(int(values.argmax()), why)
    rows = table.select(["class_name", "split", "shard"]).to_pylist()
    for index in itertools.takewhile(lambda _: len(chosen) < NUM_PREVIEWS, _spread(rows)):
        chosen.setdefault(index, "")
    return [(table.slice(index, 1).to_pylist()[0], why) for index, why in chosen.items()]


def _spread(rows: Sequence[Row]) -> Iterator[int]:
    """Positions of rows, ordered so that any first few lie in many classes and all splits."""
    cells: dict[str, dict[str, list[int]]] = {}
    for index in _rank_by_place(rows):
        cells.setdefault(rows[index]["class_name"] or "", {}).setdefault(rows[index]["split"], []).append(index)
    names = sorted(cells)
    few = [names[i] for i in np.linspace(0, len(names) - 1, min(len(names), NUM_PREVIEWS)).round().astype(int)]
    queues = [_alternate(list(cells[name].values()), first) for first, name in enumerate(few)]
    yield from (index for turn in itertools.zip_longest(*queues) for index in turn if index is not None)


def _rank_by_place(rows: Sequence[Row]) -> Iterator[int]:
    """The first video of every shard, then the second of every shard, …: the first ones cost the least to read."""
    by_shard = itertools.groupby(range(len(rows)), lambda index: rows[index]["shard"])
    ranked = [(place, index) for _, indices in by_shard for place, index in enumerate(indices)]
    return (index for _, index in sorted(ranked))


def _alternate(queues: Sequence[Sequence[int]], first: int) -> list[int]:
    """The items of all queues in turn, from queue number `first` on, counted round."""
    start = first % len(queues)
    turns = itertools.zip_longest(*queues[start:], *queues[:start])
    return [index for turn in turns for index in turn if index is not None]


def make_cards(output: str, files: Mapping[str, str], chosen: Sequence[tuple[Row, str]]) -> list[Card]:
    """The chosen videos with their previews, in the order given; each shard is read once, up to the last row needed.

    `files`: each shard's file, relative to the output.
    """
    wanted: dict[str, set[str]] = {}
    for video, _ in chosen:
        wanted.setdefault(video["shard"], set()).add(video["id"])
    made: dict[str, Preview | PreviewError] = {}
    for shard, ids in wanted.items():
        made |= _preview_shard(storage.join(output, files[shard]), ids)
    return [Card(video=video, reason=reason, preview=made[video["id"]]) for video, reason in chosen]


def _preview_shard(uri: str, ids: set[str]) -> dict[str, Preview | PreviewError]:
    made: dict[str, Preview | PreviewError] = {}
    for row in shards.read_rows(uri, ["id", "fps", "num_frames", "rgb", "flow"]):
        if row["id"] in ids:
            made[row["id"]] = try_preview(row)
        if len(made) == len(ids):
            return made
    raise DataError(f"{uri} has no row {min(ids - made.keys())!r}: make the page again after the extraction is done")


def try_preview(row: Row) -> Preview | PreviewError:
    """The preview of a shard's row, or why there is none, which is logged."""
    try:
        return make_preview(row)
    except PreviewError as error:  # a page without one preview is worth more than no page
        logger.warning("no preview of %s: %s", row["id"], error)
        return error
